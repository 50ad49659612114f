"""A `kvcompress serve` process of one's own: started, asked for its numbers, stopped."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from kvcompress import models

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
START = 180  # seconds that a server may take to come up on a busy machine
HOST = "127.0.0.1"
Numbers = dict[tuple[str, ...], float]


class Server:
    """A server on a port that was free. folder: for its log. options: of `kvcompress serve`."""

    def __init__(self, folder: Path, *options: str):
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://{HOST}:{self.port}", folder / f"server-{self.port}.log"
        command = [sys.executable, "-m", "kvcompress", "serve", *options, "--host", HOST, "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def wait(self) -> None:
        """Until it answers; raises OSError, with the end of its log, where it does not."""
        end = time.monotonic() + START
        while self.process.poll() is None and time.monotonic() < end:
            try:
                httpx2.get(f"{self.url}/health").raise_for_status()
            except httpx2.TransportError:
                time.sleep(0.1)
            else:
                return
        raise OSError(f"the server does not answer: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def numbers(self) -> Numbers:
        """/metrics, summed over models: (name, values of the other labels in the order of the labels' names) to value.

        Names are without "kvcompress_".
        """
        found: Numbers = {}
        for family in text_string_to_metric_families(httpx2.get(f"{self.url}/metrics", timeout=60).text):
            for sample in family.samples:
                labels = {name: value for name, value in sample.labels.items() if name != "model"}
                key = (sample.name.removeprefix("kvcompress_"), *(labels[name] for name in sorted(labels)))
                found[key] = found.get(key, 0) + sample.value
        return found

    def until_idle(self, seconds: float) -> None:
        """Wait until nothing is generated and nothing waits; raises OSError where that takes longer."""
        end = time.monotonic() + seconds
        while any((held := self.numbers()).get((f"requests_{name}",), 0) for name in ("running", "waiting")):
            if time.monotonic() > end:
                raise OSError(f"after {seconds} s the server still works: {held}")
            time.sleep(0.05)


def save_embedded(folder: Path) -> str:
    """The embedded model with a chat template, in a folder that can be served; returns its name."""
    model, tokenizer = models.embedded()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
