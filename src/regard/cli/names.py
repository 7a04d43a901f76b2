"""Names for the shell's completion: read from where pages lie, none of which is imported."""


def complete_page(incomplete: str) -> list[str]:
    """Names of pages that begin so."""
    from regard import catalog

    return [name for name in catalog.pages() if name.startswith(incomplete)]


def complete_pages(incomplete: str) -> list[str]:
    """The same of a list with commas, whose last name is being typed, and of pages laid over others."""
    before = max(incomplete.rfind(mark) for mark in ",+") + 1
    return [incomplete[:before] + name for name in complete_page(incomplete[before:])]


def complete_tasks(incomplete: str) -> list[str]:
    """The same of tasks: those of the package, and pages of one's own, whose kind nobody asks here."""
    from regard.bench.words import task_names

    before = incomplete.rfind(",") + 1
    return [incomplete[:before] + name for name in task_names() if name.startswith(incomplete[before:])]


def complete_kind(incomplete: str) -> list[str]:
    """Kinds of pages that begin so."""
    from regard.kinds import kind_names

    return [name for name in kind_names() if name.startswith(incomplete)]
