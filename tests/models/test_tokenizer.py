"""The tokenizer keeps every character, and cuts text where transformers does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.errors import ModelError
from llmcourse.models import load_tokenizer
from llmcourse.text.tokenizer import StreamDecoder, Tokenizer

PAGE = """In 2024, 3 naïve cafés in 東京 served 1,234.56 portions — “délicieux!”, said Łukasz; ¿verdad?
\tdef f(x):\n\t\treturn x**2  # tabs, two  spaces,   three
Привет, мир! שלום עולם — مرحبا بالعالم · नमस्ते दुनिया · สวัสดีชาวโลก · 안녕하세요
👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 é ﬁ Å Å \u200b zero-width, \xa0non-breaking, \r\n Windows line
∑ᵢ xᵢ² ≤ ∫₀^∞ e^{−x} dx, 10⁻³ Ω; $x_{i+1} = x_i - \\eta \\nabla f(x_i)$
<|im_start|>user\nHello<|im_end|>\n<html>&amp;</html> {"key": [1, 2.5e-3, null]} a'b'c don't I'LL
supercalifragilisticexpialidocious AAAAAAAA ........ -------- \n\n\n\n end
"""


def test_a_page_of_mixed_text_has_the_ids_that_transformers_gives(smol, hf_smol):
    assert smol[1].encode(PAGE) == hf_smol[1](PAGE, add_special_tokens=False).input_ids
    for line in PAGE.splitlines():
        assert smol[1].encode(line) == hf_smol[1](line, add_special_tokens=False).input_ids


def test_it_comes_without_the_weights_as_it_does_with_them(smol, tmp_path):
    alone = load_tokenizer()
    assert alone.encode(PAGE) == smol[1].encode(PAGE)
    chat = [{"role": "user", "content": "Who are you?"}]
    assert (alone.chat(chat), alone.eos_ids) == (smol[1].chat(chat), smol[1].eos_ids)
    with pytest.raises(ModelError, match="there is no model at"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load_tokenizer(tmp_path / "broken.gguf")


# The model's vocabulary has no token for the bytes 0xF1 and 0xF2 (which begin the characters of planes
# 4 to 11, where Unicode assigns none) and for six control characters. transformers loses them as well.
ASSIGNED = st.characters(
    codec="utf-8", exclude_categories=["Cn", "Cs", "Co"], exclude_characters="\x04\x06\x13\x14\x16\x1d"
)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=ASSIGNED))
def test_every_text_survives_the_round_trip(smol, text):
    assert smol[1].decode(smol[1].encode(text)) == text


def test_the_page_survives_the_round_trip(smol):
    assert smol[1].decode(smol[1].encode(PAGE)) == PAGE


def test_the_chat_format_is_the_one_transformers_builds(smol, hf_smol):
    talks = [
        [{"role": "user", "content": "Hi {{ 7 * 7 }}"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    ]
    for talk in talks:
        for answer in (True, False):
            theirs = hf_smol[1].apply_chat_template(talk, tokenize=False, add_generation_prompt=answer)
            assert smol[1].chat(talk, answer=answer) == theirs


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=ASSIGNED, max_size=40))
def test_streaming_shows_the_same_text_and_never_half_a_character(smol, text):
    stream = StreamDecoder(smol[1])
    ids = smol[1].encode(text)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == smol[1].decode(ids, special=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_template_cannot_reach_python(smol):
    from jinja2.exceptions import SecurityError

    hostile = Tokenizer(smol[1].backend, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(SecurityError):
        hostile.chat("hi")


def test_a_model_without_a_chat_template_says_so(smol):
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer(smol[1].backend, chat_template=None).chat("hi")


def test_a_gguf_with_an_unknown_pre_tokenizer_is_refused():
    with pytest.raises(ModelError, match="llama-bpe"):
        Tokenizer.from_gguf({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"})
