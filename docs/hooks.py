"""What MkDocs does not do by itself: pages made from other files, links out of `docs/`, references in docstrings."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_multiturn"
REPOSITORY = "https://github.com/trl-multiturn/trl-multiturn/blob/main"
_LINK = re.compile(r"(\]\()([^)#\s:]+)([)#])")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
# `[`name`]` and `[`~package.name`]`, as TRL's docstrings write them, but no link of Markdown
_SECTIONS = ("Args:", "Parameters:", "Attributes:", "Raises:", "Returns:")
_ENTRY = re.compile(r"^    (`?[*\w]+`?(?:, `?[*\w]+`?)*)( \(.*\))?:(?: (.*))?$")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_FIELDS = re.compile(r"^<!-- fields: ([\w.]+) -->$", re.MULTILINE)
_REFERENCE = re.compile(r"\[`~?([\w.]+)(\(\))?`\](?![\[(])")


# Pages that stand beside `docs/`
_BESIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: MkDocsConfig) -> None:
    for source, name in _BESIDE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    messages = messages_page()
    files.append(File.generated(config, "messages.md", content=messages))
    unknown = unknown_first_words((ROOT / "docs/troubleshooting.md").read_text("utf-8"), messages)
    if unknown:
        raise PluginError(f"Troubleshooting quotes first words that no message has: {'; '.join(unknown)}.")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)
    markdown = _FIELDS.sub(lambda found: fields_table(found[1]), markdown)
    if page.file.src_uri in _BESIDE.values():
        markdown = _outside_code(markdown, lambda text: _LINK.sub(r"\1../\2\3", text).replace("](../docs/", "]("))
    return _outside_code(markdown, lambda text: _LINK.sub(lambda link: _out_of_docs(link, folder), text))


def _out_of_docs(link: re.Match[str], folder: str) -> str:
    """A link that leaves `docs/` works in a clone as it stands; on the site it leads to the repository."""
    path = posixpath.normpath(posixpath.join("docs", folder, link[2]))
    if path.startswith("docs/"):
        return link[0]
    if path in _BESIDE:
        return f"{link[1]}{posixpath.relpath(_BESIDE[path], folder or '.')}{link[3]}"
    if path.startswith("..") or not (ROOT / path).exists():
        raise PluginError(f"The link to {link[2]} leads to nothing ({path} in the repository).")
    return f"{link[1]}{REPOSITORY}/{path}{link[3]}"


def _outside_code(markdown: str, change: Any) -> str:
    parts = _FENCE.split(markdown)
    parts[::2] = [change(text) for text in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    return _FORMULA.sub(
        lambda found: convert(unescape(found[3]), display="block" if found[2] == "[" else "inline"), html
    )


# ---------------------------------------------------------------- docstrings


class TRLDocstrings(griffe.Extension):
    """TRL's references in docstrings as links where the site has the object, and its sections as lists."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value.replace("# docstyle-ignore", "")
            obj.docstring.value = _REFERENCE.sub(_reference, sections_as_lists(text)) + _fields_beside(obj, text)


def _fields_beside(obj: griffe.Object, docstring: str) -> str:
    """The table of a configuration whose docstring leaves its fields to their help."""
    listed = any(section in docstring for section in _SECTIONS)
    if listed or not obj.is_class or not obj.name.endswith("Config"):
        return ""
    return f"\n\n{fields_table(obj.path)}"


def sections_as_lists(docstring: str) -> str:
    """
    `Args:` and the like with their indented entries, as a heading and a list of Markdown.

    An entry is a line that ends in a colon or has `: ` after its type; its text is indented further, or follows the
    colon.
    """
    lines, section = [], False
    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 0 and line.strip():
            section = line.strip() in _SECTIONS
            lines += ["", f"**{line.strip()[:-1]}**", ""] if section else [line]
        elif section and line.strip().startswith(">"):
            lines += ["", f"*{line.strip()[1:].strip()}*", ""]
        elif section and indent == 4 and (entry := _ENTRY.match(line)):
            lines.append(f"- **{entry[1]}** {entry[2] or ''}: {entry[3] or ''}".rstrip())
        else:
            lines.append(line[4:] if section and indent >= 8 else line)
    return "\n".join(lines)


def _reference(found: re.Match[str]) -> str:
    name, call = found[1].removeprefix("trl_multiturn."), found[2] or ""
    home = _documented().get(name)
    return f"[`{name}{call}`][{home}]" if home else f"`{found[1]}{call}`"


def _documented() -> dict[str, str]:
    pages = (ROOT / "docs").rglob("*.md")
    paths = [path for page in pages for path in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE)]
    return {path.rpartition(".")[2]: path for path in paths}


# ---------------------------------------------------------------- fields of configurations


def fields_table(path: str) -> str:
    """Name, default and help of the fields that a configuration itself declares, in their order."""
    module, _, name = path.rpartition(".")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text("utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    lines = ["| field | default | |", "| --- | --- | --- |"]
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
            default = keywords.get("default") or keywords["default_factory"]
            shown = "`[]`" if ast.unparse(default) == "list" else f"`{ast.unparse(default)}`"
            help_text = ast.literal_eval(keywords["metadata"])["help"].replace("|", "\\|")
            lines.append(f"| `{ast.unparse(node.target)}` | {shown} | {help_text} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- all messages


# Texts of other kinds: prompts for policies, worked examples, help of the command line, citations
_NO_MESSAGES = re.compile(
    r"tools/(alfworld|python_tool|scienceworld|textworld)|scripts/(shots|arguments)|cli|verify/reasoning_gym"
)
_NO_MESSAGE_KEYWORDS = ("metadata", "help", "description", "epilog")
_SENTENCE = re.compile(r"[A-Z`…].*\.(\s|$)", re.DOTALL)


def messages_page() -> str:
    """Every message of the package, by its first words, from the places that raise, warn or write it."""
    lines = [
        "# All messages",
        "",
        "Errors, warnings and notices of this package, by module, made from its source when this site is built.",
        "Search the page for the first words of yours; `…` stands for what depends on the case. What does not name an",
        "error is a part of one, or is printed or returned.",
        "[Troubleshooting](troubleshooting.md) says more about the frequent ones.",
        "",
    ]
    for path in sorted(PACKAGE.rglob("*.py")):
        found = sorted(set(messages_in(path)), key=lambda pair: pair[1])
        if not found:
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        lines += [f"## {module}", ""]
        lines += [f"- **{kind}** {_inline(text)}" if kind else f"- {_inline(text)}" for kind, text in found] + [""]
    return "\n".join(lines)


def unknown_first_words(troubleshooting: str, messages: str) -> list[str]:
    """What the first columns of the page quote as first words, and no message has."""
    tables = re.findall(r"^\| first words \|.*\n\| ---.*\n((?:\|.*\n)+)", troubleshooting, re.MULTILINE)
    quoted = [words for table in tables for words in re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)]
    plain = messages.replace("`", "").replace("\\", "")
    return [words for words in quoted if not re.search(re.escape(words).replace("…", ".*"), plain)]


def messages_in(path: Path) -> Iterator[tuple[str, str]]:
    """Kind and text of each message in a file: what is raised, what is warned, and other sentences."""
    tree, told = ast.parse(path.read_text("utf-8")), set()
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and call.args:
            name = ast.unparse(call.func).rpartition(".")[2]
            if isinstance(node, ast.Raise) or name in ("warning", "warning_once", "warn"):
                told |= set(map(id, ast.walk(call.args[0])))
                text = _text(call.args[0])
                if len(text.split()) >= 4:
                    yield (name if isinstance(node, ast.Raise) else "warning"), text
    if not _NO_MESSAGES.match(path.relative_to(PACKAGE).as_posix()):
        yield from (("", text) for text in _other_sentences(tree, told))


def _other_sentences(tree: ast.Module, told: set[int]) -> Iterator[str]:
    """Sentences that are composed apart from the place that raises or prints them."""
    skipped = set(told)
    for node in ast.walk(tree):  # from the outside in
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # docstrings
            skipped.add(id(node.value))
        elif isinstance(node, ast.keyword) and node.arg in _NO_MESSAGE_KEYWORDS:
            skipped |= set(map(id, ast.walk(node)))
        elif isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)) and id(node) not in skipped:
            text = _text(node)
            skipped |= set(map(id, ast.walk(node)))
            if len(text.split()) >= 7 and _SENTENCE.match(text):
                yield text


def _text(node: ast.expr) -> str:
    """The text of a literal, of an f-string, or of a sum of them; `…` for everything else."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def _inline(text: str) -> str:
    text = " ".join(re.sub(r"%[.\d]*[sdrfg]", "…", text).split())
    return re.sub(r"([<>*_\[\]|\\])", r"\\\1", text) if "`" not in text else _escaped_beside_code(text)


def _escaped_beside_code(text: str) -> str:
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([<>*_\[\]|\\`])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)
