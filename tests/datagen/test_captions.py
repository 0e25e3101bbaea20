"""Captions from every source."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from transformers import (
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from data_gen import captions
from data_gen.captions import Caption, Collection, grammar_captions, make_captions, parse
from data_gen.config import CaptionsConfig
from pig.errors import InputError
from pig.models.names import WEIGHTS
from pig.toyworld import scene


@pytest.mark.parametrize(
    ("line", "object_"),
    [
        ("Caption: A photo of a red rose, nestled alone in a glass vase.", "red rose"),
        ("3. Caption: A photo of an old camera, on a blanket", "old camera"),
        ("- Caption: A photo of a teacup, on a lace doily.", "teacup"),
        ("A photo of a teacup, on a lace doily.", None),
        ("Caption: A photo of a teacup", None),
        ("Caption: A photo of a [object], [scene]", None),
        ("Caption: A photo of two teacups, on a doily", None),
        ("Caption: A photo of a very long phrase that is not an object, on a doily", None),
        ("Sure! Here are your captions:", None),
    ],
)
def test_only_the_form_asked_for_is_a_caption(line, object_) -> None:
    caption = parse(line)
    assert (caption.object if caption else None) == object_


def test_grammar_has_no_duplicates_and_no_held_out_pair() -> None:
    config = CaptionsConfig(count=600, max_object_share=0.2)
    made = grammar_captions(config, seed=0)
    assert len({caption.caption for caption in made}) == 600
    assert made == grammar_captions(config, seed=0)
    assert made != grammar_captions(config, seed=1)
    held_out = {(category, scene.BACKGROUNDS[scene.held_out_background(category)]) for category in scene.CATEGORIES}
    assert not held_out & {(c.object.split()[-1], c.caption.split(", ")[1]) for c in made}


def test_grammar_from_lists(tmp_path) -> None:
    lists = tmp_path / "lists.yaml"
    lists.write_text("objects: [teapot, old camera]\nscenes: [on a table, in a box]\n")
    config = CaptionsConfig(count=4, lists=str(lists), max_object_share=0.5)
    assert Caption("a photo of an old camera, on a table", "old camera") in grammar_captions(config, seed=0)
    with pytest.raises(InputError, match="has 4 captions"):
        grammar_captions(replace(config, count=5), seed=0)
    for wrong in ("things: []\n", "objects: dog\nscenes: [here]\n", "objects: ['']\nscenes: [here]\n", "objects: [\n"):
        lists.write_text(wrong)
        with pytest.raises(InputError, match="expected YAML with the lists `objects`"):
            grammar_captions(config, seed=0)


def test_duplicates_near_duplicates_and_frequent_objects_are_refused() -> None:
    collection = Collection(10, 0.2, [])
    assert collection.add(Caption("A photo of a teacup, on a lace doily.", "teacup"))
    assert not collection.add(Caption("A photo of a teacup, on the lace doilys", "teacup"))
    assert collection.add(Caption("A photo of a blue teacup, in a box", "blue teacup"))
    assert not collection.add(Caption("A photo of a green teacup, on a shelf", "green teacup"))
    assert collection.rejected == {"duplicate": 1, "object over its share": 1}


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server whose every reply is chosen by the test."""

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self.calls, self.lock, self.authorizations = 0, threading.Lock(), set[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                server: Any = self.server
                with server.lock:
                    number, server.calls = server.calls, server.calls + 1
                    server.authorizations.add(self.headers["Authorization"])
                reply = answer(number)
                if reply == "cut":
                    self.connection.close()
                    return
                if reply == "slow":
                    time.sleep(2)
                status = reply if isinstance(reply, int) else 200
                text = reply if isinstance(reply, str) and reply != "slow" else ""
                message = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
                error = {"error": {"message": f"no: {self.headers['Authorization']}"}}  # some echo what they were sent
                body = json.dumps(error if status != 200 else message).encode()
                body = reply if isinstance(reply, bytes) else body
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    if status == 429:
                        self.send_header("Retry-After", "0.1")
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # the client had waited long enough
                    pass

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def chat_config(server: Server, count: int, **options: Any) -> CaptionsConfig:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return CaptionsConfig(
        count=count,
        captioner="chat",
        model="m",
        base_url=url,
        api_key_env="TEST_KEY",
        per_call=5,
        max_object_share=1.0,
        timeout=1.0,
        **options,
    )


def right_answer(number: int, count: int = 5) -> str:
    rows = [f"Caption: A photo of a thing{number}x{i}, on table {'abcdefghij'[number % 10]}" for i in range(count)]
    return "\n".join(rows)


def test_chat_captions_arrive_all_and_once_whatever_the_server_does(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("TEST_KEY", "gsk_very-secret")
    mishaps: dict[int, Any] = {
        0: 429,
        1: 500,
        2: "cut",
        3: "slow",
        4: "I am sorry.\nCaption: A photo of [object]",
        5: right_answer(90) + "\nnot a caption",
        6: right_answer(90),  # all of them duplicates
        7: "",
        20: b"<html>no server of captions here</html>",
        21: b'{"choices": [{"index": 0}]}',
        22: b"[]",
        23: b'{"choices": [',
        8: right_answer(91, 2) + "\nCaption: A photo of a",  # a partial answer
    }
    with Server(lambda number: mishaps.get(number, right_answer(number))) as server:
        made = make_captions(tmp_path, chat_config(server, 123), seed=0)
        assert server.authorizations == {"Bearer gsk_very-secret"}
    assert len(made) == 123
    assert len({caption.caption for caption in made}) == 123
    assert {caption.object for caption in made} >= {"thing90x0", "thing91x1"}
    assert captions.read_captions(tmp_path / captions.FILE) == made
    rejected = json.loads((tmp_path / captions.STATS).read_text())["rejected"]
    assert rejected["wrong form"] == 4
    assert rejected["duplicate"] == 5
    assert rejected["empty reply"] == 5
    written = capfd.readouterr()
    assert "secret" not in written.out + written.err + "".join(p.read_text() for p in tmp_path.iterdir())


def test_partial_answers_are_kept_when_the_server_refuses(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "gsk_very-secret")
    with Server(lambda number: right_answer(number) if number < 2 else 401) as server:
        with pytest.raises(InputError, match="does not answer: AuthenticationError") as error:
            make_captions(tmp_path, chat_config(server, 20, parallel_calls=1), seed=0)
        assert "secret" not in str(error.value)
    part = tmp_path / (captions.FILE + ".part")
    part.write_text(part.read_text() + '{"caption": "A photo of a th')  # torn, as by a kill
    with Server(lambda number: right_answer(number + 2)) as server:
        made = make_captions(tmp_path, chat_config(server, 20), seed=0)
        assert server.calls <= 4
    assert len({caption.caption for caption in made}) == 20


def test_a_server_without_new_captions_is_not_asked_for_ever(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "k")
    with Server(lambda _: right_answer(0)) as server, pytest.raises(InputError, match="no new caption"):
        make_captions(tmp_path, chat_config(server, 20), seed=0)


def test_a_chat_captioner_needs_a_key_for_the_hosted_server(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(InputError, match="TEST_KEY"):
        make_captions(tmp_path, CaptionsConfig(3, "chat", model="m", api_key_env="TEST_KEY"), seed=0)


def test_calls_are_not_made_twice_by_a_captioner_that_was_stopped(tmp_path) -> None:
    class Numbered:
        def ask(self, count: int, call: int) -> str:
            return right_answer(call)

    config = CaptionsConfig(40, "local", model="m", per_call=5, max_object_share=1.0)
    whole = list(captions.collect(Numbered(), Collection(40, 1.0, []), config))
    collection = Collection(40, 1.0, [])
    first = [caption for _, caption in zip(range(15), captions.collect(Numbered(), collection, config), strict=False)]
    resumed = Collection(40, 1.0, first)
    resumed.calls = collection.calls
    assert first + list(captions.collect(Numbered(), resumed, config)) == whole


def test_local_captioner_rejects_what_an_untrained_model_says(tmp_path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip")
    tokenizer.save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 512}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**size, **ids)).save_pretrained(tmp_path / "lm")
    config = CaptionsConfig(3, "local", model=str(tmp_path / "lm"), per_call=1)
    with pytest.raises(InputError, match=r"no new caption.*wrong form"):
        make_captions(tmp_path / "out", config, seed=0)
    with pytest.raises(InputError, match="captions.model"):
        make_captions(tmp_path / "out", replace(config, model=str(tmp_path / "none")), seed=0)
