"""Bytes to text, or the reason why they are none."""


def decode(raw: bytes) -> str | None:
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def undecodable(raw: bytes) -> str:
    """Why `decode` gave nothing."""
    if is_utf16(raw):
        return "UTF-16, not UTF-8: convert it first"
    if b"\0" in raw:
        return "holds NUL bytes: not text"
    return "not UTF-8"


def is_utf16(raw: bytes) -> bool:
    return raw[:2] in (b"\xff\xfe", b"\xfe\xff")


def too_long(max_bytes: int) -> str:
    return f"a document over {max_bytes} bytes: longer than data.max_characters allows"
