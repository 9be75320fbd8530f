"""Questions with numeric answers from a file on this machine, in the layout in which GSM8K (2110.14168) is published: jsonl
or parquet, each row a question and a worked answer whose last line is "#### 72".

    {"question": "Natalia sold clips to 48 of her friends …", "answer": "… <<48+24=72>>72 clips …\\n#### 72"}

The verifier reads the final number of a response, after the last "####", else in the last \\boxed{…}, else the last of all,
and compares by value: thousands separators, signs, currency, percent, decimals, fractions and units do not matter. Format is 1
where the answer was marked. A demonstration is the row's answer, without the calculator's <<…>> unless `annotations`.

Held-out rows come from `held_out_file`, whose questions are then left out of training, else they are the `share` of the
questions with the lowest checksums. A row that cannot be used is an error that names its line, unless `skip_bad`.

For a card: provides prompts, demonstrations. Data: GSM8K's grade-school word problems (MIT licence), 7,473 for training and
1,319 for testing, or any file of that layout; nothing is downloaded. For pretrained models. Gold metrics: pass@k, maj@k.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from envs.prompts.base import PromptWorld
from envs.prompts.numbers import final, number, spelled
from envs.prompts.task import Problem, Task, Verdict
from runner.errors import UserError
from runner.interface import data_root, knob

SHIPPED = Path(__file__).with_name("questions.jsonl")
END, MARKER = "\x03", "####"
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
NAMED = 5  # so many bad rows are named


class TextFile(Task):
    eos = END

    def __init__(self, file: str, held_out_file: str | None = None, prompt_length: int | None = None,
                 response_length: int | None = None, ask: str = "\n", annotations: bool = False, skip_bad: bool = False,
                 share: float = 0.1):
        """file: .jsonl or .parquet; a relative path lies in the project's data folder. ask: what follows each question.
        Lengths that are not given are the greatest in the files."""
        self.annotations, self.bad, self.ask = annotations, [], ask
        rows = self.read(file)
        if held_out_file:
            held = self.read(held_out_file)
            known = {p.prompt for p in held}
            self.rows = [p for p in rows if p.prompt not in known], held
        else:
            part = [zlib.crc32(p.prompt.encode()) / 2 ** 32 < share for p in rows]
            self.rows = [p for p, out in zip(rows, part) if not out], [p for p, out in zip(rows, part) if out]
        if self.bad and not skip_bad:
            named = self.bad[:NAMED] + ["…"] * (len(self.bad) > NAMED)
            raise UserError("\n".join([f"{len(self.bad)} rows cannot be used:", *named,
                                       "mend them, or leave them out by skip_bad=true"]))
        if not all(self.rows):
            raise UserError(f"{file}: no rows are left to {'learn from' if self.rows[1] else 'hold out'}\n"
                            "give a longer file, a held_out_file, or another share")
        both = [*self.rows[0], *self.rows[1]]
        longest = max(len(p.prompt) for p in both)
        if prompt_length is not None and longest > prompt_length:
            raise UserError(f"{file}: a prompt has {longest} characters, but prompt_length={prompt_length}\n"
                            f"set prompt_length={longest}, or take the long questions out of the file")
        self.prompt_length = prompt_length or longest
        self.response_length = response_length or 1 + max(len(self.worked(p)) for p in both)
        self.alphabet = PRINTABLE + END
        self.alphabet += "".join(sorted({c for p in both for c in p.prompt + self.worked(p)} - set(self.alphabet)))

    def read(self, file: str) -> list[Problem]:
        """The usable rows; the others are added to self.bad."""
        path, found = located(file), []
        for where, row in parquet(path) if path.suffix == ".parquet" else lines(path):
            wrong = row if isinstance(row, str) else fault(row)
            if wrong:
                self.bad.append(f"{path.name}, {where}: {wrong}")
            else:
                question, answer = row["question"].strip(), row["answer"].strip()
                found.append(Problem(question + self.ask, (number(answer.rpartition(MARKER)[2], last=False), answer)))
        return found

    def train(self):
        return self.rows[0]

    def held_out(self):
        return self.rows[1]

    def verify(self, problem, response):
        found, marked = final(response.removesuffix(END), MARKER)
        if found is None:
            return Verdict(0.0, None, 0.0)
        return Verdict(float(found == problem.answer[0]), spelled(found), float(marked))

    def worked(self, problem) -> str:
        answer = problem.answer[1]
        return answer if self.annotations else re.sub("<<[^<>]*>>", "", answer)

    def demonstrate(self, problem, rng):
        return self.worked(problem) + END


def fault(row) -> str:
    """Why a row cannot be used, "" if it can."""
    if not isinstance(row, dict):
        return "no object with question and answer"
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"no {name}" + (f" (its columns: {', '.join(map(str, row))})" if name not in row else "")
    if MARKER not in row["answer"]:
        return f"its answer has no '{MARKER}' before the final number"
    return "" if number(row["answer"].rpartition(MARKER)[2], last=False) else f"no number after '{MARKER}'"


def located(file: str) -> Path:
    path = SHIPPED if file == "shipped" else data_root() / Path(file).expanduser()
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise UserError(f"{path}: not a .jsonl or .parquet file\ngive rows of a question and an answer in either form")
    if not path.is_file():
        folder = path.parent.parent if path.parent.name == "main" else path.parent
        raise UserError(f"no file {path}\nput a file of GSM8K's layout there; the published one:\n"
                        f"huggingface-cli download --repo-type dataset openai/gsm8k --local-dir {folder}\n"
                        f"then file={folder}/main/train-00000-of-00001.parquet and held_out_file the one called test-…")
    return path


def lines(path: Path) -> Iterator[tuple[str, dict | str]]:
    """(where, row, or what is wrong with it)"""
    for i, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                yield f"line {i}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {i}", f"no JSON ({error})"


def parquet(path: Path) -> Iterator[tuple[str, dict | str]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} is a parquet file, which needs the package pyarrow\n"
                        "pip install -e '.[data]', or store the rows as .jsonl") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}\nfetch it again") from None
    for i, row in enumerate(table.to_pylist(), 1):
        yield f"row {i}", row


class TextFileWorld(PromptWorld):
    @dataclasses.dataclass(frozen=True)
    class Config(PromptWorld.Config):
        file: str = knob("shipped", "rows to learn from, .jsonl or .parquet (a relative path lies in the data folder); shipped: "
                         "forty questions of the project's own")
        held_out_file: str = knob("", "rows to evaluate on; none: a share of `file`")
        share: float = knob(0.1, "share of the rows that is held out where there is no such file", low=0.0, high=1.0)
        ask: str = knob("\n", "what follows each question in a prompt")
        annotations: bool = knob(False, "demonstrations keep the calculator's <<…>>")
        skip_bad: bool = knob(False, "rows that cannot be used are left out instead of being an error")
        prompt_length: int = knob(0, "most characters of a prompt; 0: those of the longest", low=0)

    def make_task(self):
        c = self.config
        return TextFile(c.file, c.held_out_file or None, c.prompt_length or None, ask=c.ask, annotations=c.annotations,
                        skip_bad=c.skip_bad, share=c.share)
