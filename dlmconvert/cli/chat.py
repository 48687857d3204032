"""`dlmconvert chat`: a conversation with a model, on a terminal or through a pipe."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import typer

from dlmconvert.cli.decoding import Decoder, Row, View, denoising, in_colour, load_decoder, settled_text
from dlmconvert.cli.generate import Compile, Device, MaxNewTokens, Model, Seed
from dlmconvert.cli.sampler import parse_setting, with_sampler
from dlmconvert.errors import UserError, nearest

COMMANDS = {
    "/reset": "forget the conversation (the system message stays)",
    "/system TEXT": "set the system message; without TEXT remove it",
    "/set KEY=VALUE": "a setting of the sampler, as in /set threshold=0.9; without KEY=VALUE show them",
    "/help": "this list",
    "/quit": "leave (so does the end of the input)",
}


@with_sampler
def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = False,
    *,
    asked: dict,
) -> None:
    """Talk with a converted model; answers appear as their tokens settle. Ctrl-C stops an answer, /quit leaves, /help lists more."""
    from dlmconvert.cli.console import console
    from dlmconvert.data.chat import ensure_chat_template

    asked |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    decoder = load_decoder(model, asked, device, compile)
    is_plain = ensure_chat_template(decoder.tokenizer)
    conversation = Conversation(decoder, seed, system)
    conversation.check_length()
    if decoder.denoiser.spec.trained != "sft":
        _say(f"this model was not trained on conversations (its last stage: {decoder.denoiser.spec.trained}); dlmconvert sft does that", "yellow")
    if is_plain:
        _say("the tokenizer has no chat template: `User: ...`, `Assistant:` on lines of their own")
    _say(f"{conversation.lengths()}; /help lists the commands")
    at_terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text must not end the conversation
    live = console.is_terminal and sys.stdout.isatty()
    view = View(decoder.tokenizer, decoder.ends, live, plain=not live)
    while (line := _read_line(at_terminal)) is not None:
        try:
            if line.startswith("/"):
                if _command(line, conversation):
                    return
            elif line.strip():
                _answer(conversation, line, view)
        except UserError as error:
            from dlmconvert.cli.console import show_error

            show_error(error.what, error.why, error.next_step)


def _read_line(at_terminal: bool) -> str | None:
    """The next line, None at the end of the input. Ctrl-C on a terminal drops the line that was begun."""
    if not at_terminal:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrows and history in input()
    while True:
        try:
            return input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            _say("\n/quit or Ctrl-D leaves")


@dataclass
class Conversation:
    """What was said. messages: user and assistant by turns, without the system message. num_answers: the key of the next answer's
    random draws, so that the same seed gives the same conversation."""

    decoder: Decoder
    seed: int
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    num_answers: int = 0
    num_forgotten: int = 0

    @property
    def room(self) -> int:
        """Tokens of an answer's canvas."""
        return self.decoder.settings["max_new_tokens"]

    def lengths(self) -> str:
        within = "" if self.decoder.longest is None else f", the conversation and the answer at most {self.decoder.longest}"
        return f"answers have at most {self.room} tokens{within}"

    def check_length(self) -> None:
        longest = self.decoder.longest
        if longest is not None and self.room >= longest:
            raise UserError(f"answers of {self.room} tokens leave no room for a question", f"the model's longest row has {longest}", "lower max_new_tokens")

    def prompt_ids(self) -> list[int]:
        """The tokens in front of the answer. What no longer fits into the model's longest row is forgotten, oldest first, and said.

        Raises UserError when the last message alone does not fit.
        """
        ids = self._render()
        longest, forgotten = self.decoder.longest, 0
        while longest is not None and len(ids) + self.room > longest:
            if len(self.messages) <= 1:
                raise UserError(
                    f"the message has {len(ids)} tokens with its template, and an answer of {self.room} must follow",
                    f"the model's longest row has {longest}",
                    f"a shorter message, or /set max_new_tokens={max(1, (longest - len(ids)) // 2)}" if len(ids) < longest else "a shorter message",
                )
            del self.messages[:2]
            forgotten += 2
            ids = self._render()
        if forgotten:
            self.num_forgotten += forgotten
            _say(f"the model's longest row of {longest} tokens is full: the {self.num_forgotten} oldest messages are forgotten", "yellow")
        return ids

    def _render(self) -> list[int]:
        messages = [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]
        try:
            rendered = self.decoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        except Exception as error:  # templates are programs of others: they raise what they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError("the chat template refuses this conversation", reason, "/system without a text removes the system message") from error
        return list(rendered["input_ids"])


def _answer(conversation: Conversation, message: str, view: View) -> None:
    """Ask, show the answer while it settles, and remember both. A message that cannot be answered is not remembered."""
    from dlmconvert.cli.console import console, out
    from dlmconvert.sampling.canvas import cut_at

    decoder = conversation.decoder
    conversation.messages.append({"role": "user", "content": message})
    try:
        prompt_ids = conversation.prompt_ids()
        # num_start: only the answer is shown.
        row = Row(message, [*prompt_ids, *[None] * conversation.room], len(prompt_ids), conversation.num_answers)
        canvas, steps, may_change = denoising("chat", decoder, [row], conversation.seed)
    except UserError:
        del conversation.messages[-1]
        raise
    began, last, num_filled, stopped = time.perf_counter(), None, conversation.room, False
    try:
        with view.watching([row], may_change):
            for step in steps:
                last = step
                num_filled -= int(step.given_back_BL.sum())
                view.see(step)
    except KeyboardInterrupt:
        stopped = True
    seconds = time.perf_counter() - began
    text = ""
    if last is not None and stopped:
        text = settled_text(decoder.tokenizer, row, last.tokens_BL[0].tolist(), last.masked_BL[0].tolist(), decoder.ends)
        num_filled = conversation.room - int(last.masked_BL.sum())
    elif last is not None:
        ids = cut_at(last.tokens_BL[0, row.num_start :].tolist(), list(decoder.ends))
        text = decoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if view.finish(text):
        out()
    elif text or not stopped:
        out(f"\x1b[32m{text}\x1b[0m" if in_colour() else text)
    conversation.num_answers += 1
    said = _without_special(decoder.tokenizer, text)
    if said:
        conversation.messages.append({"role": "assistant", "content": said})
    else:
        del conversation.messages[-1]  # an empty answer teaches the next one nothing, and templates refuse it
    if last is not None:
        numbers = f"{num_filled} tokens in {last.nfe} forwards, {num_filled / max(seconds, 1e-9):.0f} tokens/s"
        console.print(f"stopped; {numbers}" if stopped else numbers, style="dim", highlight=False)


def _without_special(tokenizer: Any, text: str) -> str:
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text.strip()


def _command(line: str, conversation: Conversation) -> bool:
    """Do what a line with a slash says. True: leave. Raises UserError for an unknown command."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return True
    if name == "/help":
        for command, meaning in COMMANDS.items():
            _say(f"  {command:15} {meaning}")
    elif name == "/reset":
        conversation.messages, conversation.num_forgotten = [], 0
        _say("the conversation is forgotten")
    elif name == "/system":
        conversation.system = rest or None
        _say(f"system message: {rest}" if rest else "no system message")
    elif name == "/set":
        for setting in rest.split():
            _set(conversation, setting)
        shown = conversation.decoder.shown_settings() | {"seed": conversation.seed}
        _say(", ".join(f"{key}={value}" for key, value in shown.items()))
    else:
        raise UserError(f"{name} is no command", nearest(name, [command.split()[0] for command in COMMANDS]))
    return False


def _set(conversation: Conversation, setting: str) -> None:
    from dlmconvert.sampling.options import with_defaults

    name, value = parse_setting(setting)
    if name == "seed":
        conversation.seed = value or 0
        return
    before = conversation.decoder
    conversation.decoder = replace(before, settings=with_defaults({name: value}, before.settings))
    try:
        if conversation.room is None:
            raise UserError("max_new_tokens needs a number")
        conversation.check_length()
    except UserError:
        conversation.decoder = before
        raise


def _say(text: str, style: str = "dim") -> None:
    from dlmconvert.cli.console import console

    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
