"""The Python code of a page."""

import re


def snippets(text):
    """Blocks of Python in Markdown, in the order of the page."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(path):
    """Execute the blocks of a page, one after another, in one namespace."""
    namespace = {}
    for snippet in snippets(path.read_text()):
        exec(compile(snippet, str(path), "exec"), namespace)
