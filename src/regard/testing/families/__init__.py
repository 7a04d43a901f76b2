"""Every causal decoder of the installed transformers, built tiny, with regard tried on it.

`survey(["llama", "falcon"])` gives a `FamilyRow` for each; `regard doctor --families` prints them, docs/families.md
keeps them.
"""

from regard.testing.families.build import build, names
from regard.testing.families.examine import VERDICTS, FamilyRow, examine
from regard.testing.families.run import survey

__all__ = ["VERDICTS", "FamilyRow", "build", "examine", "names", "survey"]
