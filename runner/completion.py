"""Shell completion from the catalogue: `eval "$(python -m runner completion bash)"`."""

from __future__ import annotations

from runner import catalogue
from runner.errors import unknown

_SECTIONS = ("loop", "hardware", "logger")


def candidates() -> dict[str, list[str]]:
    """What can be typed: commands, flags, and for every `key=` its values."""
    from runner.cli import _FLAGS, _VALUED, COMMANDS
    from runner.compose import SECTIONS
    from runner.knobs import knobs_of

    book = catalogue.Catalogue()
    values = {f"{group}=": book.names(group) for group in catalogue.GROUPS}
    keys = [*values, "seed=", "runs="]
    for name, schema in SECTIONS.items():
        for k in knobs_of(schema):
            keys.append(f"{name}.{k.name}=")
            if k.choices:
                values[f"{name}.{k.name}="] = list(k.choices)
    for kind in catalogue.KINDS:
        for entry in book.all(kind):
            for k in catalogue.knobs(entry):
                key = f"{kind}.{k.name}="
                if key not in keys:
                    keys.append(key)
                if k.choices:
                    values[key] = sorted({*values.get(key, []), *map(str, k.choices)})
    return {"words": [c for c in COMMANDS if c != "worker"] + sorted({*_FLAGS, *_VALUED}), "keys": keys, "values": values,
            "data": [e.name for e in book.all("env") if e.card.get("data")],
            "names": [n for kind in catalogue.KINDS for n in book.names(kind)],
            "claims": sorted(p.stem for p in (catalogue.CONF / "claim").glob("*/*.yaml"))}


def script(shell: str) -> str:
    if shell not in ("bash", "zsh"):
        raise unknown("shell", shell, ["bash", "zsh"])
    c = candidates()
    cases = "\n".join(f'    {key}*) words="{" ".join(key + v for v in vs)}" ;;' for key, vs in c["values"].items())
    words = f"""\
  case "$current" in
{cases}
    *)
      words="{" ".join(c["words"])} {" ".join(c["keys"])}"
      case "$line" in
        *" show "*|*" diff "*) words="{" ".join(c["names"])}" ;;
        *" list "*) words="methods envs hardware sizes loggers --json" ;;
        *" data "*) words="build list show {" ".join(c["data"])} size=claim size=paper --json" ;;
        *" claim "*) words="{" ".join(c["claims"])} --all --family seeds= --jobs" ;;
        *" eval "*|*" export "*|*" video "*) words="$(command ls runs 2>/dev/null) --to --runs" ;;
      esac ;;
  esac"""
    return (_ZSH if shell == "zsh" else _BASH).replace("@WORDS@", words)


_BASH = """\
# completion of `python -m runner` (and of the command `ballast`) in bash
_ballast() {
  local line="${COMP_LINE:0:$COMP_POINT}" current words
  [[ "$line" == *" -m runner"* || "$line" == ballast* ]] || return 0
  current="${line##* }"
@WORDS@
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  # bash splits words at '=': it completes only what stands after it
  if [[ "$current" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
    COMPREPLY=("${COMPREPLY[@]#"${current%%=*}="}")
  fi
  [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o default -F _ballast python python3 ballast
"""

_ZSH = """\
# completion of `python -m runner` (and of the command `ballast`) in zsh
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_ballast() {
  local line="${(j: :)words[1,CURRENT]}" current="$words[CURRENT]" words
  if [[ "$line" != *" -m runner"* && "$line" != ballast* ]]; then
    (( $+functions[_python] )) || autoload -Uz _python
    _python
    return
  fi
@WORDS@
  local -a ends others
  local word
  for word in ${=words}; do [[ "$word" == *= ]] && ends+=("$word") || others+=("$word"); done
  compadd -S '' -a ends
  compadd -a others
}
compdef _ballast python python3 ballast
"""
