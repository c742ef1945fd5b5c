"""Chat templates that never end, and that reach for the interpreter."""
# ruff: noqa: E501 -- messages and templates are long lines

import json
from collections.abc import Sequence

from tests.torture.attacks import BAD, World, attack

TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
TEMPLATES = {
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}" + TURNS,
    "a power without end": "{{ 10 ** (10 ** 10) }}" + TURNS,
    "text without end": "{% for a in range(99999) %}{% for b in range(9999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}"
    + TURNS,
    "a text of terabytes": "{{ 'x' * 10 ** 13 }}" + TURNS,
    "a text that doubles": "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}" + TURNS,
    "a list that doubles": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
    "{{ ns.s }}" + TURNS,
    "comparing what doubles": "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}" + TURNS,
    "a width of billions": "{{ '%9999999999d' % 1 }}" + TURNS,
    "a width of billions by format": "{{ '{:>9999999999}'.format('x') }}" + TURNS,
    "padding by a filter": "{{ 'x' | center(9999999999) }}" + TURNS,
    "indenting by a filter": "{{ ('x\n' * 9999) | indent(99999999) }}" + TURNS,
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}" + TURNS,
    "a macro that calls itself twice": "{% macro f(n) %}{% if n < 90 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}"
    "{{ f(0) }}" + TURNS,
    "a loop that calls itself": "{% for x in range(9) recursive %}{{ loop(range(9)) if loop.depth < 90 }}{% endfor %}"
    + TURNS,
    "endless on one conversation alone": "{% if messages[0]['content'] == 'Say: ' %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}" + TURNS,
    "__class__": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + TURNS,
    "__class__ by attr": "{{ ('' | attr('__class__')).mro() }}" + TURNS,
    "cycler's globals": "{{ cycler.__init__.__globals__.os.system('echo ran > CANARY') }}" + TURNS,
    "lipsum's globals": "{{ lipsum.__globals__['os'].popen('echo ran > CANARY').read() }}" + TURNS,
    "joiner's globals": "{{ joiner['__init__']['__globals__']['os'].system('echo ran > CANARY') }}" + TURNS,
    "format's attributes": "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}" + TURNS,
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}" + TURNS,
    "a namespace's insides": "{{ namespace(__class__=1) }}" + TURNS,
    "raise_exception's globals": "{{ raise_exception.__globals__['__builtins__'] }}" + TURNS,
    "strftime_now's globals": "{{ strftime_now.__globals__.sys }}" + TURNS,
    "an include": "{% include 'OUTSIDE/secret.txt' %}" + TURNS,
    "an import": "{% import 'OUTSIDE/secret.txt' as x %}{{ x }}" + TURNS,
    "extending": "{% extends 'OUTSIDE/secret.txt' %}" + TURNS,
    "control characters in its complaint": "{{ raise_exception('" + BAD + "') }}" + TURNS,
    "an answer of control characters": TURNS + "\x1b[2J{{ '\\x9b31m' }}",
}
WORKING = {"an answer of control characters", "format_map"}


def _template(name: str, text: str) -> None:
    def filled(w: World) -> str:
        return text.replace("CANARY", str(w.canary)).replace("OUTSIDE", str(w.outside))

    code, says = (0, "") if name in WORKING else (2, "the chat template")

    @attack(f"template of a model: {name}", code, says)
    def _(w: World) -> Sequence[object]:
        messages = [{"role": "user", "content": "Say: "}, {"role": "assistant", "content": "a word"}]
        (w.here / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        return ["show", "--model", w.templated(filled(w)), "--data", "rows.jsonl"]

    if name in ("an endless loop", "cycler's globals", "an include"):

        @attack(f"--chat-template: {name}", code, says)
        def _(w: World) -> Sequence[object]:
            (w.here / "t.jinja").write_text(filled(w))
            return ["show", "--model", w.model, "--data", "rows.jsonl", "--chat-template", "t.jinja"]


for _name, _text in TEMPLATES.items():
    _template(_name, _text)
