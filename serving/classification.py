"""What a request to classify may say: JSON, or files as multipart/form-data."""

import base64
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving.schema import Body, Limits, RequestError, tree_of, validated

MAX_FIELD_CHARACTERS = 512
"""Of a form's fields that are no files."""
FILE_FIELDS = ("image", "inputs", "file", "files")


@dataclass(frozen=True)
class Classification:
    model: str
    inputs: tuple[Any, ...]
    """What image predictors take: `{"image": BASE64}` or `{"pixels": [[0..255, ...], ...]}`."""


class _ImageInput(Body):
    image: str | None = None
    pixels: list[list[Any]] | None = None


class _ClassifyBody(Body):
    model: str
    inputs: Annotated[list[_ImageInput], Field(min_length=1)]


def parse_classification(body: bytes, limits: Limits) -> Classification:
    """
    Raises:
        RequestError: 400, naming the input that cannot be used.
    """
    asked = validated(_ClassifyBody, tree_of(body))
    _check_count(len(asked.inputs), limits)
    return Classification(
        asked.model, tuple(_image(item, index) for index, item in enumerate(asked.inputs))
    )


def parse_form(content_type: bytes, body: bytes, limits: Limits) -> Classification:
    """A form with a field `model` and one or more files named `image`.

    Raises:
        RequestError: 400, saying what the form lacks.
    """
    form = _Form(limits.choices)
    form.read(content_type, body)
    if form.model is None:
        raise RequestError(
            400,
            "you must provide the field model",
            param="model",
            code="missing_required_parameter",
        )
    if not form.files:
        raise RequestError(400, "you must provide a file named image", param="image")
    images = tuple({"image": base64.b64encode(file).decode()} for file in form.files)
    return Classification(form.model, images)


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.choices:
        raise RequestError(
            400,
            f"{count} inputs, and this service answers {limits.choices} in one request: split it",
            param="inputs",
        )


def _image(item: _ImageInput, index: int) -> Any:
    where = f"inputs[{index}]"
    if (item.image is None) == (item.pixels is None):
        raise RequestError(400, f"{where}: give either image or pixels", param="inputs")
    if item.pixels is not None:
        return {"pixels": item.pixels}
    # Browsers hand out data URLs; what stands before the comma says what the bytes say themselves.
    return {"image": (item.image or "").rpartition(",")[2]}


class _Form:
    """Collects a form's parts; the body as a whole is bounded already."""

    def __init__(self, most_files: int) -> None:
        self.model: str | None = None
        self.files: list[bytes] = []
        self._most = most_files
        self._name, self._field, self._value = "", b"", b""
        self._content = bytearray()

    def read(self, content_type: bytes, body: bytes) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= 70:  # RFC 2046, section 5.1.1
            raise RequestError(400, "the form's content-type lacks its boundary")
        try:
            parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_field,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header,
                    "on_part_data": self._on_data,
                    "on_part_end": self._end,
                },
            )
            parser.write(body)
            parser.finalize()
        except FormParserError as error:
            raise RequestError(400, f"the body is not a form: {str(error)[:200]}") from None

    def _begin(self) -> None:
        self._name, self._content = "", bytearray()

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._field, self._value = b"", b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def _end(self) -> None:
        if self._name in FILE_FIELDS:
            self.files.append(bytes(self._content))
            _check_count(len(self.files), Limits(0, self._most))
        elif self._name == "model":
            try:
                self.model = self._content.decode("utf-8")[:MAX_FIELD_CHARACTERS]
            except UnicodeError:
                raise RequestError(400, "the field model is not UTF-8", param="model") from None
