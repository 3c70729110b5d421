"""The page at `/` in a real browser, over engines that follow a script."""

import asyncio
import math
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serving.auth import new_key
from serving.engines.base import (
    Chat,
    Event,
    Finished,
    GenerationRequest,
    Likelihood,
    Predicted,
    PredictionRequest,
    Started,
    TokenLogprob,
    Tokens,
)
from tests.browser import CHROMIUM, Page, browsing
from tests.scripted import application, listening

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
WORDS = ("def", " 问候", "(名字)", ":", "\n    ", "return", ' "你好 🦉"', "\n")
PICTURES = os.environ.get("HELIOSTAT_PICTURES") or tempfile.mkdtemp(prefix="hs-page-")
"""Where the test leaves what it saw."""


def scored(text: str, probability: float) -> TokenLogprob:
    def one(text: str, probability: float) -> Likelihood:
        return Likelihood(1, text, text.encode(), math.log(probability))

    others = (one("pass", 0.5 * (1 - probability)), one(" x", 0.3 * (1 - probability)))
    return TokenLogprob(one(text, probability), (one(text, probability), *others))


async def speak(request: Any) -> AsyncIterator[Event]:
    if isinstance(request, PredictionRequest):
        yield Started("model/digits@1")
        scores = {"1": 0.93, "7": 0.05, "4": 0.02}
        yield Predicted(({"label": "1", "score": 0.93, "scores": scores},))
        return
    assert isinstance(request, GenerationRequest)
    yield Started("model/gpt@3", 4)
    if isinstance(request.prompt, str) and "forever" in request.prompt:
        yield Tokens("a", (1,))
        await asyncio.sleep(60)
    if isinstance(request.prompt, Chat) and "lang" in request.prompt.messages[-1]["content"]:
        for line in range(60):
            await asyncio.sleep(0.005)
            yield Tokens(f"Zeile {line}\n", (line,))
    if isinstance(request.prompt, Chat):
        assert all(set(m) == {"role", "content"} for m in request.prompt.messages)
    for place, word in enumerate(WORDS):
        await asyncio.sleep(0.01)
        yield Tokens(word, (place,), (scored(word, 0.97 - 0.11 * place),))
    yield Finished("stop", len(WORDS))


def visit(scene: Callable[[Page], Awaitable[None]], **options: Any) -> Any:
    app, gateway = application(speak, **options)
    with listening(app) as url:

        async def there() -> Page:
            async with browsing(url) as page:
                await scene(page)
                return page

        return asyncio.run(there()), gateway


def test_a_text_is_continued_and_each_token_explains_itself() -> None:
    async def scene(page: Page) -> None:
        await page.becomes("models.length")
        await page.run("document.querySelector('[name=mode][value=text]').click()")
        await page.run("at('prompt').value = '# 中文\\n'")
        await page.run("at('prompt').focus()")
        await page.press("Enter", 13, modifiers=2)
        await page.becomes("/end of text/.test(at('status').textContent)")
        assert await page.run("at('output').innerText") == "# 中文\n" + "".join(WORDS)
        assert "8 tokens" in await page.run("at('status').textContent")
        assert "tokens/s" in await page.run("at('status').textContent")
        await page.size(1200, 800)
        await page.run("at('shade').click(); at('output').focus()")
        for _ in range(4):
            await page.press("ArrowRight", 39)
        assert not await page.run("at('tip').hidden")
        told = await page.run("at('tip').textContent")
        assert told.splitlines()[0].split() == ["64.0", "%", "→", '":"'] and '"pass"' in told
        await page.picture(Path(PICTURES, "text-wide.png"), 1200, 800)
        await page.picture(Path(PICTURES, "text-phone.png"), 390, 900, dark=True)
        assert await page.run("at('tip').hidden")
        assert await page.run("document.documentElement.scrollWidth <= innerWidth")

    page, gateway = visit(scene)
    assert page.problems == [] and gateway.open == 0
    assert gateway.asked[0].sampling.logprobs == 5


def test_a_chat_goes_back_and_forth_and_can_be_stopped() -> None:
    async def scene(page: Page) -> None:
        await page.becomes("models.length")
        for question in ("写一个函数。", "Und auf Deutsch?"):
            await page.run(f"at('prompt').value = {question!r}; at('go').click()")
            await page.becomes("/end of text/.test(at('status').textContent) && !running")
            await page.run("say('')")
        assert await page.run("document.querySelectorAll('.said').length") == 4
        assert await page.run("said.length") == 4
        await page.size(1200, 900)
        await page.run("at('shade').click()")
        point = await page.run(
            "(() => { const b = document.querySelectorAll('.said .token')[6]"
            ".getBoundingClientRect(); return [b.x + 2, b.y + 2]; })()"
        )
        await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=point[0], y=point[1])
        await page.becomes("!at('tip').hidden")
        await page.picture(Path(PICTURES, "chat-wide.png"), 1200, 900)
        await page.picture(Path(PICTURES, "chat-phone.png"), 390, 900)
        await follows_an_answer(page)
        await page.run("document.querySelector('[name=mode][value=text]').click()")
        await page.run("at('prompt').value = 'forever'; at('go').click()")
        await page.becomes("/a$/.test(at('output').innerText)")
        await page.press("Escape", 27)
        await page.becomes("/stopped after 1 token/.test(at('status').textContent)")

    page, gateway = visit(scene)
    assert page.problems == [] and gateway.open == 0


async def follows_an_answer(page: Page) -> None:
    """Its end and the buttons stay in view, unless the reader scrolled away."""
    below = "document.documentElement.scrollHeight - scrollY - innerHeight"
    await page.size(390, 844)
    await page.run("at('prompt').value = 'lang'; at('go').click()")
    await page.becomes("/Zeile 30/.test(at('talk').textContent)")
    assert await page.run(below) < 60
    assert await page.run("at('stop').getBoundingClientRect().bottom <= innerHeight")
    await page.becomes("!running")
    await page.run("at('prompt').value = 'lang'; at('go').click()")
    await page.becomes(
        "running && /Zeile 5/.test(document.querySelector('#talk').lastChild.innerText)"
    )
    await page.run("scrollTo(0, 0)")
    await page.becomes("!running")
    assert await page.run("scrollY") == 0


def test_a_key_is_asked_for_and_images_are_classified() -> None:
    secret, key = new_key("page")

    async def scene(page: Page) -> None:
        await page.becomes("!at('access').hidden")
        assert "asks for an API key" in await page.run("at('status').textContent")
        assert not await page.run("at('status').classList.contains('wrong')")
        await page.run("at('key').value = 'wrong'; at('key').dispatchEvent(new Event('change'))")
        await page.becomes("/not one of this service/.test(at('status').textContent)")
        await page.picture(Path(PICTURES, "key-wide.png"), 1000, 500)
        await page.run(f"at('key').value = '{secret}'")
        await page.run("at('key').dispatchEvent(new Event('change'))")
        await page.becomes("models.length")
        await page.run("at('model').value = 'digits'; show()")
        await page.run(
            "(async () => { const c = document.createElement('canvas'); c.width = c.height = 40;"
            "c.getContext('2d').fillRect(0, 0, 9, 40);"
            "const file = await new Promise((done) => c.toBlob(done));"
            "const d = new DataTransfer();"
            "d.items.add(new File([file], '图.png', { type: 'image/png' }));"
            "at('drop').dispatchEvent(new DragEvent('drop', { dataTransfer: d })); })()"
        )
        await page.becomes("/93.0 %/.test(at('status').textContent)")
        assert await page.run("document.querySelectorAll('#bars li').length") == 3
        await page.picture(Path(PICTURES, "image-wide.png"), 1000, 640)
        await page.picture(Path(PICTURES, "image-phone.png"), 390, 900)

    page, gateway = visit(scene, keys=[key])
    # The browser itself logs the 401s that came before there was a right key.
    assert len(page.problems) == 2 and all("401" in problem for problem in page.problems)
    assert set(gateway.asked[0].inputs[0]) == {"image"}
