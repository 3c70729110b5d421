"""What requests may say: OpenAI's conventions, and one clear sentence for everything else."""

import json
from typing import Any

import pytest

from serving.classification import parse_classification, parse_form
from serving.completion import (
    _NEUTRAL,
    HARMLESS,
    Completion,
    _ChatBody,
    _CompletionBody,
    parse_chat,
    parse_completion,
    parse_tokenize,
)
from serving.engines.base import Chat, SamplingParameters
from serving.schema import Limits, RequestError

LIMITS = Limits(max_tokens=100, choices=8)


def completion(**fields: Any) -> Completion:
    return parse_completion(json.dumps({"model": "m", "prompt": "a"} | fields).encode(), LIMITS)


def test_the_defaults_are_those_of_the_conventions() -> None:
    asked = completion()
    assert asked.sampling == SamplingParameters(max_tokens=16, temperature=1.0, top_p=1.0)
    assert (asked.n, asked.echo, asked.stream, asked.include_usage) == (1, False, False, False)
    # To echo or score a prompt, and not as many as fit.
    nothing = completion(max_tokens=0, echo=True, logprobs=1)
    assert nothing.sampling.max_tokens == 0 and not nothing.fill


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("你好", ("你好",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_is_text_texts_tokens_or_lists_of_tokens(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_null_and_neutral_values_ask_for_nothing() -> None:
    null = dict.fromkeys(
        ("max_tokens", "temperature", "stop", "seed", "logprobs", "suffix", "logit_bias", "n")
    )
    assert completion(**null) == completion()
    neutral = {"best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}
    assert completion(**neutral, no_such_field={"any": "thing"}) == completion()


def test_fields_arrive() -> None:
    asked = completion(
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        stop="。",
        seed=-3,
        n=2,
        stream=True,
        echo=True,
        stream_options={"include_usage": True},
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"5": -100},
        logprobs=0,
    )
    assert asked.sampling == SamplingParameters(
        7, 0, 0.5, 0, ("。",), -3, 0.5, -1.0, ((5, -100.0),), 0
    )
    assert asked.n == 2 and asked.stream and asked.echo and asked.include_usage


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 2},
        {"suffix": "x"},
        {"min_p": 0.1},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"chat_template": "{{ x }}"},
        {"reasoning_effort": "low"},
        {"parallel_tool_calls": True},
        {"parallel_tool_calls": False},
        {"service_tier": "priority"},
        {"verbosity": "low"},
        {"store": True},
        {"moderation": {"model": "m"}},
        {"guided_json": {"type": "object"}},
        {"structured_outputs": {"regex": "a+"}},
        {"use_beam_search": True},
        {"continue_final_message": True},
    ],
)
def test_known_but_unsupported_fields_are_refused_by_name(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, name)
    assert (name in caught.value.message, caught.value.code) == (True, "unsupported")
    with pytest.raises(RequestError, match=name):
        chat({"role": "user", "content": "a"}, **fields)


def test_no_field_of_the_conventions_is_ignored_by_oversight() -> None:
    """Every field that the official client can send is read, refused by name, or known to be
    harmless."""
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chats

    bases = completions.CompletionCreateParamsBase, chats.CompletionCreateParamsBase
    for base, schema in zip(bases, (_CompletionBody, _ChatBody), strict=True):
        known = {*schema.model_fields, *_NEUTRAL, *HARMLESS}
        assert set(base.__annotations__) - known == set()
    labels = dict.fromkeys(HARMLESS, "a")
    assert completion(**labels) == completion()
    asks_nothing = {"reasoning_effort": "none", "service_tier": "auto", "store": False}
    assert completion(**asks_nothing, verbosity="medium") == completion()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 9}, "n"),
        ({"n": 2, "prompt": ["a"] * 5}, "n"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"max_completion_tokens": 101}, "max_completion_tokens"),
        ({"model": 1}, "model"),
    ],
)
def test_wrong_values_name_their_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    error = caught.value.body()["error"]
    assert error["type"] == "invalid_request_error" and param in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "prompt": "a", "temperature": NaN}',
        b'{"model": "m", "prompt": "a", "temperature": 1e999}',
        b'{"model": "m", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"prompt": "a"}',
    ],
)
def test_bodies_that_are_no_request_are_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion(body, LIMITS)
    assert caught.value.status == 400


def classification(*inputs: Any) -> Any:
    body = json.dumps({"model": "m", "inputs": list(inputs)}).encode()
    return parse_classification(body, LIMITS).inputs


def test_images_come_as_base64_data_urls_or_pixels() -> None:
    assert classification(
        {"image": "AAAA"}, {"image": "data:image/png;base64,AAAA"}, {"pixels": [[0, 255]]}
    ) == ({"image": "AAAA"}, {"image": "AAAA"}, {"pixels": [[0, 255]]})


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [{}],
        [{"image": "AAAA", "pixels": [[0]]}],
        ["text"],
        [{"image": 3}],
        [{"image": "A"}] * 9,
    ],
)
def test_what_is_no_image_is_refused(inputs: list[Any]) -> None:
    with pytest.raises(RequestError) as caught:
        classification(*inputs)
    assert (caught.value.status, caught.value.param) == (400, "inputs")


def chat(*messages: Any, **fields: Any) -> Completion:
    return parse_chat(
        json.dumps({"model": "m", "messages": list(messages)} | fields).encode(), LIMITS
    )


def test_a_chat_is_messages_of_text() -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    asked = chat(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "?"},
        max_completion_tokens=5,
        max_tokens=9,
        logprobs=True,
        top_logprobs=3,
    )
    assert asked.prompts == (
        Chat(
            (
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "你好"},
                {"role": "assistant", "content": ""},
                {"role": "user", "content": "?"},
            )
        ),
    )
    assert (asked.sampling.max_tokens, asked.sampling.logprobs, asked.chat) == (5, 3, True)
    # As many as fit, which only the model's tokenizer can tell.
    assert chat({"role": "user", "content": "a"}).fill and not asked.fill


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ([], {}, "messages"),
        ([{"role": "user"}], {}, "messages"),
        ([{"role": "tool", "content": "a"}], {}, "messages"),
        ([{"content": "a"}], {}, "messages"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "messages"),
        ([{"role": "user", "content": 3}], {}, "messages"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], {}, "messages"),
        ([{"role": "assistant", "content": "a", "audio": {"id": "1"}}], {}, "messages"),
        ([{"role": "user", "content": "a"}], {"top_logprobs": 2}, "top_logprobs"),
        ([{"role": "user", "content": "a"}], {"logprobs": 2}, "logprobs"),
        ([{"role": "user", "content": "a"}], {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_is_no_chat_is_refused(
    messages: list[Any], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        chat(*messages, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_either_a_prompt_or_messages_are_tokenised() -> None:
    both = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    for fields in ({}, both):
        with pytest.raises(RequestError, match="either prompt or messages"):
            parse_tokenize(json.dumps({"model": "m", **fields}).encode())
    assert parse_tokenize(b'{"model": "m", "prompt": ""}').prompt == ""


def form(*parts: tuple[str, bytes], boundary: str = "b") -> Any:
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in parts
    )
    kind = f"multipart/form-data; boundary={boundary}".encode()
    return parse_form(kind, body + f"--{boundary}--\r\n".encode(), LIMITS)


def test_images_come_as_files_of_a_form() -> None:
    asked = form(("model", "数字".encode()), ("image", b"\x00\xff"), ("image", b"\r\n--"))
    assert asked.model == "数字"
    assert asked.inputs == ({"image": "AP8="}, {"image": "DQotLQ=="})


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [("image", b"a")],
        [("model", b"m")],
        [("model", b"\xff"), ("image", b"a")],
        [("model", b"m"), *[("image", b"a")] * 9],
    ],
)
def test_what_is_no_form_is_refused(parts: list[tuple[str, bytes]]) -> None:
    with pytest.raises(RequestError) as caught:
        form(*parts)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"", b"--b", b"junk", b"--b\r\nx", b"--b\r\n: :\r\n\r\n"])
@pytest.mark.parametrize("kind", [b"multipart/form-data", b"multipart/form-data; boundary=b", b""])
def test_broken_forms_are_refused(kind: bytes, body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_form(kind, body, LIMITS)
    assert caught.value.status == 400
