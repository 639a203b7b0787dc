"""XML from files nobody has looked at yet: no entities, no DTD, bounded in size, depth and number of elements.

Everything that reads XML goes through `parse_xml`; what the elements mean is for the formats to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import ParseError, TreeBuilder

from nnunet_dsp.annotations import AnnotationError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

MAX_BYTES = 64 * 2**20
MAX_ELEMENTS = 5_000_000
MAX_DEPTH = 64


def parse_xml(path: Path, limit: int = MAX_BYTES) -> Element:
    """The root element of an XML file.

    The encoding is the file's own (its declaration or byte order mark, UTF-8 without one).

    Args:
        path: the file.
        limit: the most bytes to accept.

    Raises:
        AnnotationError: no XML, cut off, with a DTD or entities, too large, too deep, or of too many elements.
        OSError: the file cannot be read.
    """
    # Within the function: `nnunet_dsp import --help` is instant
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import DefusedXMLParser

    if path.exists() and not path.is_file():
        raise AnnotationError(f"{path}: expected an XML file, but it is a folder or a device.")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise AnnotationError(f"{path}: the file is larger than {limit // 2**20} MiB. Export it in several parts.")
    if not data.strip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"):
        raise AnnotationError(f"{path}: the file is empty. Export it again.")
    try:
        parser = DefusedXMLParser(target=_BoundedBuilder(), forbid_dtd=True)
        parser.feed(data)
        root: Element = parser.close()
    except DefusedXmlException as error:
        what = "entities" if "Entit" in type(error).__name__ else "a document type (DTD)"
        raise AnnotationError(
            f"{path}: the file declares {what}, which annotation tools do not write and which can do harm. "
            "Export it again, or remove the <!DOCTYPE ...>."
        ) from None
    except ParseError as error:
        line, column = error.position
        cut = " The file seems to be cut off; copy it again." if "no element found" in str(error) else ""
        reason = str(error).split(":", 1)[0]
        raise AnnotationError(f"{path}: not valid XML at line {line}, column {column}: {reason}.{cut}") from None
    except _TooMuch as error:
        raise AnnotationError(f"{path}: {error}") from None
    except (LookupError, ValueError) as error:  # an encoding nobody knows, or of several bytes a letter
        raise AnnotationError(f"{path}: the file cannot be decoded ({error}). Save it as UTF-8.") from None
    return root


class _TooMuch(Exception):
    """More depth or elements than annotations have."""


class _BoundedBuilder(TreeBuilder):
    """Builds the tree as ever, counting: memory for elements is many times that of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.elements = 0

    def start(self, tag: Any, attributes: Any) -> Any:
        self.depth += 1
        self.elements += 1
        if self.depth > MAX_DEPTH:
            raise _TooMuch(f"elements are nested more than {MAX_DEPTH} deep, as in no annotation file.")
        if self.elements > MAX_ELEMENTS:
            raise _TooMuch(f"there are more than {MAX_ELEMENTS} elements. Export the file in several parts.")
        return super().start(tag, attributes)

    def end(self, tag: Any) -> Any:
        self.depth -= 1
        return super().end(tag)
