"""The unit of text that every source yields; knows nothing of where texts come from or of tokens.

Called by the sources beside it and by whoever tokenises what they yield.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text of a source.

    `name` is the document's relative path with forward slashes, unique within its source; `text` is the decoded text
    with newlines as `\\n`.
    """

    name: str
    text: str
