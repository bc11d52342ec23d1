"""Test that the service counts a prompt's tokens as the engine does, for any text."""

from __future__ import annotations

import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from redis import Redis

from jobs import catalog
from jobs.text_rules import cleaned
from service.lookups.token_counter import TokenCounter
from worker.engine.wan_engine import WanEngine

AWKWARD = {
    "plain": "a small red circle moving right on a black background",
    "empty": "",
    "chinese": "一个红色的小圆圈在黑色背景上向右移动，镜头缓慢推进。",
    "emoji": "🟥 → 🟦 👩🏽‍🚀 🏳️‍🌈 flying 🚀🚀🚀",
    "entities": "a &lt;red&gt; circle &amp;amp; a &quot;blue&quot; square &#x1F534; &nbsp;end",
    "entities of entities": "a <b>red</b> circle &amp;amp; two &amp;lt;squares&amp;gt;",
    "german": "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen über "
    "Straßenbahnhaltestellenhäuschen, während Rindfleischetikettierungsüberwachungsaufgaben "
    "übertragungsgesetzmäßig größere Größen gewähren",
    "mojibake": "the caf\u00c3\u00a9 is \u00e2\u20ac\u0153open\u00e2\u20ac\u009d",
    "ligatures": "ﬁne ﬂowers, ｆｕｌｌｗｉｄｔｈ “quotes” and … dots",
    "white space": "  two\n\tlines\u00a0and\u2003wide\u3000spaces \r\n ",
    "combining": "e\u0301 a\u0308 o\u0302 नमस्ते مرحبا שלום",
    "special tokens": "a circle</s><pad> and <unk> more",
    "invisible": "zero\u200bwidth\u200djoined\ufeffmark",
}


@pytest.fixture
def counter(redis: Redis, engine: WanEngine) -> TokenCounter:
    assert engine.model.tokenizer is not None
    catalog.publish_tokenizer(redis, engine.model.tokenizer, engine.tokenizer_text)
    return TokenCounter(redis)


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_service_and_engine_count_alike(
    engine: WanEngine, counter: TokenCounter, text: str
) -> None:
    assert cleaned(text) == prompt_clean(text)
    assert engine.model.tokenizer is not None
    assert counter.count(engine.model.tokenizer, text) == engine.prompts.count_tokens(text)


def test_the_offer_names_the_published_text_and_the_bound(engine: WanEngine) -> None:
    assert engine.model.tokenizer is not None
    assert engine.model.tokenizer == catalog.tokenizer_fingerprint(engine.tokenizer_text)
    assert engine.model.max_prompt_tokens == engine.config.text_tokens == 64
    assert engine.model.tokenizer in "\n".join(engine.describe())
