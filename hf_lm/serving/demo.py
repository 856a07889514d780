"""A page on this machine to try a model: what it can do, each in a tab, and which words surprised it."""

import html
import math
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from queue import SimpleQueue

import gradio as gr
from torch import nn
from transformers import TextClassificationPipeline

from ..evaluation.sentences import score_sentences
from ..evaluation.translation import pairs_of, translate
from ..generation.conversation import fit_conversation
from ..generation.decoding import decoding_settings
from ..generation.prompts import context_limit, encode_prompt, room_for_answer
from .engine import Engine, Piece, Row, Text

FULL_COLOUR = 16  # bits: a token as surprising as this has the strongest colour


def stream(
    engine: Engine, tokenizer, ids: list[int], max_new_tokens: int, temperature: float, top_p: float
) -> Iterator[str]:
    """Yield the answer to a prompt as it grows, always from its start; generation ends where nobody reads on."""
    config, pieces, text = deepcopy(engine.defaults), SimpleQueue(), ""
    config.update(**decoding_settings(temperature, top_p))
    row = Row(ids, config, max_new_tokens, Text(tokenizer), pieces.put)
    engine.submit([row])
    piece = Piece()
    try:
        while piece.finish is None:
            piece = pieces.get()
            if isinstance(piece.finish, Exception):
                raise piece.finish
            text += piece.text
            yield text
    finally:
        row.finished = True


def surprise(model: nn.Module, tokenizer, text: str) -> str:
    """The text as HTML: the more bits a token cost, the stronger its colour, see-through to be read on light and dark."""
    score = score_sentences(model, tokenizer, [text])[0]
    bits = [-value / math.log(2) for value in score.token_log_probabilities]
    spans = "".join(
        f'<span title="{cost:.1f} bits" style="background: rgb(224 96 32 / {0.6 * min(cost / FULL_COLOUR, 1):.0%})">'
        f"{html.escape(token)}</span>"
        for token, cost in zip(score.tokens, bits, strict=True)
    )
    summary = f"{len(bits)} tokens, {sum(bits):.1f} bits, {score.bits_per_byte:.3f} bits per byte"
    return f'<p style="white-space: pre-wrap; line-height: 1.8">{spans}</p><p>{summary}</p>'


def build_demo(name: str, model: nn.Module, tokenizer) -> gr.Blocks:
    """
    The page of a model, a tab for each thing it can do: classify; or else generate, show its surprise, and chat and
    translate where the tokenizer was made for it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    limit = context_limit(model) or 4096

    def box(label: str = "Text") -> gr.Textbox:
        return gr.Textbox(label=label, lines=6)

    def settings() -> list[gr.Slider]:
        return [
            gr.Slider(1, max(limit // 2, 2), min(200, max(limit // 2, 1)), step=1, label="New tokens at most"),
            gr.Slider(0, 2, 0.8, step=0.05, label="Temperature (0: greedy)"),
            gr.Slider(0.05, 1, 0.95, step=0.05, label="Top p"),
        ]

    def tab(name: str, run: Callable, inputs: list, output) -> gr.Interface:
        return gr.Interface(run, inputs, output, submit_btn=name, clear_btn=None, flagging_mode="never")

    def label(text: str) -> dict[str, float]:
        return {row["label"]: row["score"] for row in classifier([text], truncation=True, max_length=limit)[0]}

    def continued(prompt: str, max_new_tokens: int, temperature: float, top_p: float) -> Iterator[str]:
        ids = encode_prompt(tokenizer, prompt)
        room = room_for_answer(model, ids, max_new_tokens)
        for text in stream(engine, tokenizer, ids, room, temperature, top_p):
            yield prompt + text

    def answer(message: str, history: list[dict], max_new_tokens: int, *settings: float) -> Iterator[str]:
        turns = [{"role": turn["role"], "content": turn["content"][0]["text"]} for turn in history]
        messages = [*turns, {"role": "user", "content": message}]
        _, ids, room = fit_conversation(tokenizer, messages, context_limit(model), max_new_tokens)
        yield from stream(engine, tokenizer, ids, room, *settings)

    def translation(pair: str, text: str) -> str:
        return translate(model, tokenizer, [text], pair)[0]

    if model.can_generate():
        engine = Engine(model)
        tabs = {
            "Generate": tab("Generate", continued, [box("Prompt"), *settings()], box()),
            "Surprise": tab("Show", partial(surprise, model, tokenizer), [box()], gr.HTML(label="The text")),
        }
        if tokenizer.chat_template:
            # as plain text: in Markdown an answer could make the browser fetch pictures from anywhere
            shown = gr.Chatbot(label="Conversation", render_markdown=False, buttons=["copy", "copy_all"])
            extra = {"additional_inputs": settings(), "additional_inputs_accordion": "Settings"}
            tabs = {"Chat": gr.ChatInterface(answer, chatbot=shown, **extra), **tabs}
        if pairs := pairs_of(tokenizer):
            choice = gr.Dropdown(pairs, value=pairs[0], label="From - to")
            tabs = {"Translate": tab("Translate", translation, [choice, box()], box("Translation")), **tabs}
    else:
        classifier = TextClassificationPipeline(model=model, tokenizer=tokenizer, top_k=None)
        tabs = {"Classify": tab("Classify", label, [box()], gr.Label(label="Label"))}
    return gr.TabbedInterface(list(tabs.values()), list(tabs), title=name)
