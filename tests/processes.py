"""Which of several processes (`pytest -n 2`) runs a test: one has all of a file, whose caches are made once.

A name is all that is asked of a test: groups that marks give (`--dist loadgroup` of pytest-xdist 3.8) are not seen
with pytest 9.2.
"""

from xdist.scheduler import LoadScopeScheduling

# tests of these files share nothing and take long together: each goes to the process that is free
SPREAD = {f"test_{name}.py" for name in ("attach", "every_page", "layers")}
BY_PAGE = "test_choices.py"  # what is asked of a page shares its runs


def group_of(test: str) -> str:
    """What a test is run together with, of its name."""
    path, _, name = test.partition("::")
    file = path.rpartition("/")[2]
    if file in SPREAD:
        return test
    if file == BY_PAGE and "[" in name:
        page = name.partition("[")[2].removesuffix("]").partition("-")[0]
        return f"{path}::{page}"
    return path


class ByFile(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
