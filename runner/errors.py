"""Errors that a user can mend: printed in a few lines, exit code 2, nothing written."""

import difflib


class UserError(Exception):
    """What happened, the nearest right thing, what to do. The command line prints it without a traceback."""

    exit_code = 2


def nearest(name, known, most=3):
    """The names in `known` most like `name`, best first: at most `most` of them."""
    known = [str(k) for k in known]
    found = difflib.get_close_matches(str(name), known, n=most, cutoff=0.5)
    found += [k for k in known if str(name).lower() in k.lower() and k not in found]
    return found[:most]


def unknown(what, name, known, hint=""):
    """A UserError for a name that does not exist: says what is near, or lists what there is."""
    near = nearest(name, known)
    lines = [f"unknown {what} '{name}'"]
    if near:
        lines.append("did you mean: " + ", ".join(near) + "?")
    else:
        listed = sorted(map(str, known))
        lines.append(f"known: {', '.join(listed[:12])}" + (", …" if len(listed) > 12 else ""))
    if hint:
        lines.append(hint)
    return UserError("\n".join(lines))
