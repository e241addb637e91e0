"""Renders the constructs of chat templates with Jinja2, as transformers compiles them.

Writes `jinja.json`, or the file that the first argument names: for each template its text, or its error.
"""

import datetime
import json
import pathlib
import sys

import jinja2
import transformers
from transformers.utils.chat_template_utils import _compile_jinja_template

DATE = datetime.datetime(2024, 7, 6)

CONTEXT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Two plus\ntwo? "},
        {"role": "assistant", "content": "Four.", "tool_calls": None},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather at \"a\" place <é>",
                "parameters": {
                    "type": "object",
                    "properties": {"place": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                    "required": ["place"],
                },
            },
        }
    ],
    "x": {"b": "<a & 'b'> \\u003c \"é\" 語\n", "a": [1, 2.5, -3, True, None, {}, []], "c": {"z": 1, "y": {"q": 2, "p": 3}}},
    "floats": [1e20, 1e-07, 0.1, 1e16, 123456789012345680.0, 1e15, 0.0001, 0.00001, -0.0, 1.5e300, 5e-324, 100.0, 3.0],
    "ints": [9223372036854775807, 9223372036854775808, 18446744073709551615, -9223372036854775808],
    "text": "\x1c\u2003 It's \"quoted\" ǆ ß-word (x) [y] {z} <w>\x1f",
    "spaces": "\t a\x0bb\x0cc\x1cd\x85e\u2028f\r\ng\rh\n",
    "people": [{"name": "Bo", "age": 3}, {"name": "al", "age": 1}, {"name": "Cy", "age": 3}, {"name": "al"}],
    "calls": [
        {"role": "system", "content": " Use tools. "},
        {"role": "user", "content": [{"type": "text", "text": "Weather? "}, {"type": "image"}]},
        {
            "role": "assistant",
            "content": "<think>\nLook.\n</think>\n\nI look.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Ghent", "days": 2}}},
                {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "{\"t\": 19}"},
        {"role": "tool", "tool_call_id": "c2", "content": "<tool_response>dry</tool_response>"},
        {"role": "assistant", "content": "19 degrees.", "tool_calls": []},
        {"role": "user", "content": "Thanks."},
    ],
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_generation_prompt": True,
    "enable_thinking": False,
    "none": None,
}

# A line break in a table is one of a template.
LINES = [
    "a\n{% if true %}\nb\n{% endif %}\nc\n",
    "{% for m in messages %}\n  {{ m.role }}:\n  {%- if loop.first %}\n first\n  {%- endif %}\n{% endfor %}\nend\n\n",
    "a \n  {%- set y = 1 -%}  \n b {#- c -#} \n d{# e #}\nf",
    "  {% raw %}\n {{ x }} {% if %}\n{% endraw %}\n g",
    "{{ 'a\nb' }}\n\n{{ \"c\\nd\" }}\n",
    "{%+ if true +%}\n  a\n  {%+ endif %}\n",
]

SOURCES = [
    # Line ends.
    *LINES,
    *[lines.replace("\n", "\r\n") for lines in LINES],
    *[lines.replace("\n", "\r") for lines in LINES],
    # Escapes of strings.
    r"{{ '\a\b\f\n\r\t\v' }}|{{ '\\ \' \"' }}|{{ '\0\7\12\101\377\0123' }}",
    r"{{ '\x41\xe9' }}{{ '\u00e9\u8a9e' }}{{ '\U0001F600' }}",
    r"{{ '\/' }}{{ '\d\s\w\.\q' }}{{ 'C:\path' }}",
    "{{ 'a\\\nb' }}{{ 'c\\\r\nd' }}",
    r"{{ '\é' }}{{ 'é語😀' }}{{ '\\é' }}",
    r"{{ '\x4' }}",
    r"{{ '\u00e' }}",
    r"{{ '\U00110000' }}",
    r"{{ '\777' }}{{ '\400' }}",
    r"{{ 'a' '\n' 'b' }}{{ '{{' }}{{ '%}' }}{{ \"'\" }}".replace('\\"', '"'),
    # Numbers and constants.
    "{{ floats }}",
    "{% for f in floats %}{{ f }} {% endfor %}",
    "{{ floats | tojson }}",
    "{{ 1e20 }} {{ 1e-07 }} {{ 1.0 }} {{ 12345678.9 }} {{ 1e100 }} {{ 0.1 + 0.2 }}",
    "{{ 1e20 ~ '' }} {{ 1e-7 | string }} {{ [1e20, 1] | join('-') }}",
    "{{ ints }} {{ ints[1] + 1 }} {{ ints | tojson }}",
    "{{ 170141183460469231731687303715884105727 }} {{ 2 ** 100 }} {{ 10 ** 30 }}",
    "{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 4 / 2 }} {{ 2 ** 3 }} {{ 2 ** -1 }} {{ 7.5 // 2 }}",
    "{{ 1_000 }} {{ 0x1f }} {{ 0b101 }} {{ 0o17 }} {{ 1_0.5 }}",
    "{{ true }} {{ True }} {{ none }} {{ None }} {{ false }} {{ not true }} {{ true + 1 }}",
    "{{ 1 / 0 }}",
    "{{ 5 | float }} {{ '3.7' | float }} {{ '42' | int }} {{ 3.99 | int }} {{ 'x' | int }} {{ 'x' | int(7) }} {{ none | int }} {{ ' 1_000 ' | int }} {{ '-3.9' | int }} {{ true | int }} {{ 'x' | int(default=none) }} {{ '1e3' | float }} {{ none | float(1.5) }} {{ '0x1f' | int(0, 16) }} {{ 'x' | float }}",
    "{{ 2.5 | round }} {{ 3.14159 | round(2) }} {{ 2.1 | round(0, 'ceil') }} {{ 2.9 | round(method='floor') }} {{ 42 | round }} {{ 0.5 | round | int }}",
    "{{ -5 | abs }} {{ [1, 2, 3] | sum }} {{ [3, 1, 2] | max }} {{ [3, 1, 2] | min }}",
    # Printing.
    "{{ x }}",
    "{{ messages }}",
    "{{ [] }} {{ {} }} {{ () }} {{ (1,) }} {{ (1, 'a') }} {{ ['it\\'s', 'a\"b', 'a\\'b\"c'] }}",
    "{{ ['\\t\\n\\r\\\\', '\\x00\\x7f\\x85\\xa0\\xad', 'é\\u200b\\u2028\\ufeff', '\\U0001F600'] }}",
    "{{ {'b': 1, 'a': [true, none]} }} {{ {1: 2, 'x': 1.0} }}",
    "{{ dict(b=1, a=2) }} {{ dict({'z': 1}, y=2) }}",
    "{{ range(3) | list }} {{ range(5, 1, -2) | list }}",
    "{{ 'a' ~ 1 ~ none ~ true ~ [1] ~ {'k': 'v'} }}",
    "{{ x.b }}{{ x['a'] | length }}{{ missing }}{{ x.missing }}",
    # JSON.
    "{{ x | tojson }}",
    "{{ x | tojson(indent=4) }}",
    "{{ x | tojson(indent=0) }}",
    "{{ x | tojson(indent=none) }}",
    "{{ x | tojson(ensure_ascii=true) }}{{ '😀' | tojson(true) }}",
    "{{ x | tojson(sort_keys=true) }}",
    "{{ x | tojson(separators=(',', ':')) }}",
    "{{ x | tojson(indent=2, separators=(' ,', ' = ')) }}",
    "{{ x.a | tojson(indent='\t') }}{{ x.a | tojson(indent=true) }}",
    "{{ {1: 'a', true: 'b', none: 'c', 1.5: 'd'} | tojson }}",
    "{{ {'a': 1, (1, 2): 2} | tojson }}",
    "{{ '\\x00\\x1f\\x7f\\u2028/\\\\\"' | tojson }}{{ () | tojson }}{{ (1, 2) | tojson }}",
    "{{ missing | tojson }}",
    "{{ tools | tojson(indent=4) }}",
    "{% for tool in tools %}{{ tool.function | tojson }}\n{% endfor %}",
    "{{ {'b': 2, 'a': 1} | tojson }} {{ [{'b': 2, 'a': 1}] | tojson(sort_keys=True) }}",
    "{{ x.items() | list | tojson }}",
    "{{ namespace(a=1) | tojson }}",
    # The order of keys.
    "{% for key, value in x.items() %}{{ key }}={{ value }};{% endfor %}",
    "{% for key in x %}{{ key }}{% endfor %} {{ x | list }} {{ x.keys() | list }} {{ x.c.values() | list }}",
    "{% for key, value in x.c | items %}{{ key }}{{ value }}{% endfor %}{{ x | length }}",
    "{{ x.c | dictsort }} {{ {'b': 2, 'A': 3, 'c': 1} | dictsort }} {{ {'b': 2, 'a': 3} | dictsort(by='value') }} {{ {'b': 2, 'a': 3} | dictsort(false, 'key', true) }}",
    "{{ x.keys() }} {{ x.c.items() }} {{ x.c.values() }}",
    "{{ x.get('b') is string }} {{ x.get('q') }} {{ x.get('q', 'd') }} {{ x.c.get('z', 0) }}",
    "{% set d = {'b': 1, 'a': 2, 'b': 3} %}{{ d }} {{ dict(d, c=1) }} {{ d == {'a': 2, 'b': 3} }}",
    "{% set _ = x.update({'k': 1}) %}{{ x.k }}",
    "{% set a = [1] %}{% set _ = a.append(2) %}{{ a }}",
    "{{ x.pop('b') }}",
    # Methods of strings.
    "[{{ text.strip() }}][{{ text.lstrip() }}][{{ text.rstrip() }}][{{ text | trim }}]",
    "{{ spaces.split() }} {{ spaces.splitlines() }} {{ spaces.splitlines(true) }}",
    "{{ text.title() }}|{{ text | title }}|{{ text.capitalize() }}|{{ text | capitalize }}|{{ text.swapcase() }}",
    "{{ 'they\\'re \"bill\\'s\" 3rd o\\'neil x-ray' .title() }}|{{ 'they\\'re \"bill\\'s\" 3rd o\\'neil x-ray' | title }}",
    "{{ 'ǆ ß ŉ İ Σας ΑΣ'.title() }} {{ 'ΑΣ ΑΣΑ'.lower() }} {{ 'ß'.upper() }} {{ 'ǆx'.capitalize() }}",
    "{{ 'a,b,,c'.split(',') }} {{ 'a,b,c'.split(',', 1) }} {{ 'a,b,c'.rsplit(',', 1) }} {{ ' a  b '.split(' ') }} {{ ' a b c '.split(none, 1) }} {{ ' a b c '.rsplit(none, 1) }} {{ ' a '.split(none, 0) }} {{ 'a  b '.split(none, 5) }} {{ 'a b c'.split(maxsplit=1) }} {{ 'abc'.split(sep='b') }}",
    "{{ ''.split() }} {{ ''.split(',') }}",
    "{{ 'a'.split('') }}",
    "{{ 'xxaxx'.strip('x') }} {{ 'xyaxy'.lstrip('yx') }} {{ '\n\na\n'.lstrip('\\n') }} {{ 'a..'.rstrip('.') }} {{ ' a '.strip(none) }}",
    "{{ 'hello'.startswith('he') }} {{ 'hello'.startswith(('x', 'he')) }} {{ 'hello'.endswith('lo') }} {{ 'hello'.startswith('l', 2) }} {{ 'hello'.endswith('l', 0, 3) }}",
    "{{ 'hello'.startswith(['he']) }}",
    "{{ 'hello'.startswith(1) }}",
    "{{ 'aXbX'.replace('X', '-') }} {{ 'aXbX'.replace('X', '-', 1) }} {{ 'ab'.replace('', '-') }} {{ 'aaa'.replace('a', 'b', -1) }} {{ 'aXb' | replace('X', '-') }} {{ 'aaa' | replace('a', 'b', 2) }}",
    "{{ 'hello'.find('l') }} {{ 'hello'.find('l', 3) }} {{ 'hello'.rfind('l') }} {{ 'hello'.find('z') }} {{ 'hello'.index('l') }} {{ 'hello'.count('l') }} {{ 'hello'.count('') }} {{ 'éé'.find('é', 1) }}",
    "{{ 'hello'.index('z') }}",
    "{{ 'a-b-c'.partition('-') }} {{ 'a-b-c'.rpartition('-') }} {{ 'abc'.partition('-') }} {{ 'abc'.rpartition('-') }}",
    "{{ 'prefix-a'.removeprefix('prefix-') }} {{ 'a.txt'.removesuffix('.txt') }} {{ 'a'.removeprefix('b') }}",
    "[{{ 'a'.center(5) }}][{{ 'a'.ljust(3, '.') }}][{{ 'a'.rjust(3) }}][{{ '7'.zfill(3) }}][{{ '-7'.zfill(4) }}][{{ 'ab'.center(5, '*') }}][{{ 'a' | center(6) }}]",
    "{{ 'a\tb'.expandtabs(4) }}|{{ '01\t012'.expandtabs() }}",
    "{{ ', '.join(['a', 'b']) }} {{ ''.join('abc') }} {{ '-'.join(x) }} {{ ['a', 1, none] | join(',') }} {{ people | join(', ', attribute='name') }} {{ [1, 2] | join }}",
    "{{ ', '.join(['a', 1]) }}",
    "{{ 'a1'.isalnum() }} {{ 'ab'.isalpha() }} {{ '12'.isdigit() }} {{ '½'.isnumeric() }} {{ '½'.isdigit() }} {{ '²'.isdigit() }} {{ '²'.isdecimal() }} {{ 'ab'.islower() }} {{ 'AB'.isupper() }} {{ 'Ab Cd'.istitle() }} {{ ' \x1c'.isspace() }} {{ ''.isspace() }} {{ 'a_1'.isidentifier() }} {{ 'a\n'.isprintable() }} {{ 'é'.isascii() }}",
    "{{ 'abc'.upper().lower() }} {{ 'abc' | upper }} {{ 'ABC' | lower }} {{ 'abc' | first }} {{ 'abc' | last }} {{ 'abc' | length }} {{ 'abc' | reverse }} {{ 'abc' | list }}",
    "{{ '{} {}'.format(1, 'a') }} {{ '{0} {1} {0}'.format('a', 'b') }} {{ '{a:>5}|{b:.2f}|{c}'.format(a='x', b=3.14159, c='q') }} {{ '{{}}'.format() }} {{ '{:,}'.format(1234567) }} {{ '{:05d} {:x} {:e}'.format(42, 255, 1234.5) }}",
    "{{ '{}'.format(1e20) }}",
    "{{ '{!r}'.format('a') }}",
    "{{ '%r' % 'a' }}",
    "{{ '{}'.format(none) }} {{ '{}'.format([1, 'a', true]) }} {{ '{x[a]}'.format(x={'a': 1}) }}",
    "{{ '%s and %s' % ('a', 1) }} {{ '%d%%' % 5 }} {{ '%.2f' % 3.14159 }} {{ 'x%sx' % none }} {{ '%05d|%-5s|%x' % (42, 'ab', 255) }} {{ '%(a)s' % {'a': 1} }}",
    "{{ '%s %s' | format('a', 1e20) }}",
    "{{ '%s' | format(x.c) }} {{ '%s' | format([1.0, none]) }}",
    "{{ '%s' % 'a' ~ 'b' }} {{ 1 + 7 % 4 * 2 }} {{ 'a' ~ '%s' % 'b' }} {{ ('%s' % 'a') | upper }} {{ '%s' % 'a' | upper }} {{ 2 * 7 % 4 }} {{ -7 % 4 }} {{ '%s' % messages[0].role }}",
    "{{ '%d' % 'a' }}",
    "{{ 'ab' * 3 }} {{ 3 * 'ab' }} {{ 'ab' * 0 }} {{ '-' * 10 }}",
    "{{ 'a' + 1 }}",
    "{{ 'abc'[0] }} {{ 'abc'[-1] }} {{ 'abc'[1:] }} {{ 'abc'[::-1] }} {{ 'abc'[:-1] }} {{ 'abcdef'[1:5:2] }} {{ 'abc'[10:] }} {{ 'abc'[5] }}",
    "{{ 'abc'.encode('utf-8') }}",
    "{{ 'ßX'.casefold() }}",
    "{{ 'abc'.nothing() }}",
    "{{ 'é'.__len__() }}",
    # Filters.
    "{{ people | selectattr('age') | map(attribute='name') | list }} {{ people | selectattr('age', 'equalto', 3) | list | length }} {{ people | rejectattr('age', 'defined') | map(attribute='name') | join }}",
    "{{ people | map(attribute='age', default=0) | list }} {{ ['a', 'B'] | map('upper') | list }} {{ [' a '] | map('trim') | list }} {{ [1, 2, 3] | select('odd') | list }} {{ [1, 2, 3] | reject('gt', 1) | list }}",
    "{{ people | sort(attribute='name') | map(attribute='name') | list }} {{ ['b', 'A', 'c'] | sort }} {{ ['b', 'A'] | sort(case_sensitive=true) }} {{ [1, 3, 2] | sort(reverse=true) }}",
    "{% for g in people | selectattr('age', 'defined') | groupby('age') %}{{ g.grouper }}:{{ g.list | length }}/{{ g[0] }} {% endfor %}",
    "{% for k, v in ['a', 'b'] | groupby(0) %}{{ k }}{{ v }}{% endfor %}",
    "{{ ['a', 'A', 'b'] | unique | list }} {{ [1, 1, 2] | unique | list }} {{ [1, 2, 3, 4, 5] | batch(2, 0) | list }} {{ [1, 2, 3, 4, 5] | slice(2) | list }}",
    "{{ [1, 2] | reverse | list }} {{ [1, 2] | first }} {{ [] | first }} {{ [1, 2] | last }} {{ 'b' | default('d') }} {{ missing | default('d') }} {{ '' | default('d', true) }} {{ none | d('n') }}",
    "{{ 'a\nb\n\nc' | indent }}|{{ 'a\nb\n\nc' | indent(2, true) }}|{{ 'a\n\nb' | indent(2, blank=true) }}|{{ 'a\nb' | indent('> ', first=true) }}",
    "{{ 'a b_c d-e' | wordcount }}",
    "{{ 'hello world foo' | truncate(9) }} {{ 'hello world' | truncate(5, true, '') }}",
    "{{ 'a long text here' | wordwrap(6) }}",
    "{{ '<a & \"b\"/\'c\'>' | e }} {{ '<a>' | escape }} {{ '<a>' | safe }}",
    "{{ '<b>x</b> y' | striptags }}",
    "{{ 'a b/é?' | urlencode }}",
    "{{ [1, 2] | pprint }}",
    "{{ [1, 2] | string }} {{ 5 | string | length }} {{ none | string }} {{ true | string }} {{ missing | string }}|",
    "{{ people[0] | attr('name') }}|{{ people[0] | attr('name') is defined }}",
    "{{ people[:2] | sum(attribute='age') }} {{ [1.5, 2] | sum(start=1) }} {{ people | map(attribute='name') | unique | list }}",
    "{{ [1, 2, 3] | nofilter }}",
    "{{ 1 is notest }}",
    "{{ [[1, 2], [3]] | sum(start=[]) }}",
    "{{ 'a-b' | replace('-', '') | upper | list | join('.') }}",
    "{{ 123456 | filesizeformat }}",
    "{{ {'a': 'x', 'b': none} | xmlattr }}",
    # Tests.
    "{{ 'a' is string }} {{ x is mapping }} {{ x is iterable }} {{ 'a' is iterable }} {{ 'a' is sequence }} {{ [1] is sequence }} {{ (1,) is sequence }} {{ x is sequence }} {{ 1 is iterable }} {{ x.items() is sequence }}",
    "{{ 1 is number }} {{ true is number }} {{ true is integer }} {{ 1 is integer }} {{ 1.0 is float }} {{ true is boolean }} {{ 1 is true }} {{ true is true }} {{ none is none }} {{ 2 is even }} {{ 3 is odd }} {{ 4 is divisibleby(2) }}",
    "{{ missing is defined }} {{ missing is undefined }} {{ x.missing is defined }} {{ none is defined }} {{ missing is none }} {{ x.b is not none }} {{ 'upper' is filter }} {{ 'odd' is test }}",
    "{{ range is callable }} {{ x is callable }}",
    "{{ 1 in [1, 2] }} {{ 'b' in x }} {{ 'q' not in x }} {{ 'b' in 'abc' }} {{ 3 in (1, 2) }} {{ 'a' is in ['a'] }} {{ not 1 in [2] }} {{ none in [none] }}",
    "{{ 1 == 1.0 }} {{ '1' == 1 }} {{ [1] == [1] }} {{ (1,) == [1] }} {{ 1 < 2 < 3 }} {{ 1 < 2 > 3 }} {{ 'a' < 'b' }} {{ true == 1 }} {{ none == false }} {{ x == x }} {{ 1 != 2 }}",
    "{{ 1 < 'a' }}",
    "{{ 'A' is upper }} {{ 'a' is lower }} {{ 1 is sameas 1 }} {{ 'abc' is eq 'abc' }} {{ 3 is gt 2 }} {{ 3 is lessthan 2 }}",
    "{{ 1 in missing }} {{ missing == missing }} {{ missing or 'd' }} {{ missing | length }} {{ missing ~ 'a' }} {% for y in missing %}{% endfor %}",
    "{{ missing.attr }}",
    "{{ missing + 'a' }}",
    "{{ missing() }}",
    "{{ x.nothing() }}",
    "{{ none.attr is defined }} {{ none['a'] is defined }} {{ messages[9] is defined }} {{ messages[-1].role }} {{ 1 .attr is defined }} {{ 'a'.attr is defined }} {{ messages[0].nothing is defined }}",
    "{{ '' or 'a' }} {{ 0 or none }} {{ 'a' and 'b' }} {{ [] and 1 }} {{ not [] }} {{ not none }} {{ 1 if [] else 2 }} {{ (1 if false) is undefined }}",
    # Statements.
    "{% for m in messages[1:] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if loop.nextitem }}{{ loop.cycle('a', 'b') }}{{ loop.depth }};{% endfor %}",
    "{% for m in messages[::-1] %}{{ m.role }} {% endfor %}{% for m in messages | reverse %}{{ m.role }} {% endfor %}{% for i in range(messages | length - 1, -1, -1) %}{{ messages[i].role }} {% endfor %}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.found = true %}{% set ns.n = ns.n + loop.index %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.n }}",
    "{% set y = 1 %}{% for i in [1, 2] %}{% set y = y + i %}{{ y }}{% endfor %}{{ y }}{% if true %}{% set y = 9 %}{% endif %}{{ y }}",
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.role }}{% else %}none{% endfor %}{% for m in [] %}{% else %}empty{% endfor %}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% macro m(a, b='x', c=none) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }} {{ m(1, 2, 3) }} {{ m(1, c=2) }}",
    "{% macro m(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, d=5) }}",
    "{% macro m(a, b='x') %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }} {{ m(b=1, a=2) }} {{ m() }} {{ m.name }}",
    "{% macro m(a) %}[{{ a }}{{ caller('z') }}]{% endmacro %}{% call(v) m(1) %}in {{ v }}{% endcall %}",
    "{% macro m(n) %}{{ n }}{% if n > 0 %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(3) }}{{ m(1) | length }}{{ m(1) ~ 'x' }}{{ 'a' + m(0) }}",
    "{% set y %}a{{ 1 }}{% endset %}{{ y }}{{ y | length }}{% set z | upper %}b{% endset %}{{ z }}{% filter trim | upper %} c {% endfilter %}",
    "{% set a, b = 1, (2, 3) %}{{ a }}{{ b }}{% set (c, d) = [4, 5] %}{{ c }}{{ d }}{% for k, (v, w) in [(1, (2, 3))] %}{{ k }}{{ v }}{{ w }}{% endfor %}",
    "{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a }}",
    "{% for i in [[1, [2, [3]]]] recursive %}{% if i is iterable %}({{ loop(i) }}){% else %}{{ i }}{{ loop.depth0 }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content | trim }}{% endif %}{% endfor %}",
    "{% generation %}{% set y = 1 %}{{ y }}{% endgeneration %}{{ y }}",
    "{{ raise_exception('no ' ~ 'good') }}",
    "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%A, %B %-d, %y %j %%') }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b",
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] | trim + '\n' %}{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{{ s }}{{ rest | length }}",
    "{% do messages.append(1) %}",
    "{% include 'a' %}",
    "{% if true %}",
    "{{ x.b",
    "{% nothing %}",
    "{{ 1 if true else 2 if false else 3 }} {{ (1, 2)[0] }} {{ [1, 2][-1] }} {{ {'a': {'b': 1}}['a']['b'] }} {{ {'a': 1}.a }} {{ [[1]][0][0] }}",
    "{{ 1 ~ 2 + 3 }}",
    "{{ 1 + 2 * 3 - 4 / 2 }} {{ 'a' ~ 1 * 2 }} {{ 2 ** 3 ** 2 }} {{ -2 ** 2 }} {{ not 1 == 2 }} {{ 'b' + 1 ~ 'a' }}",
    "{{ [1, 2] + [3] }} {{ (1,) + (2,) }} {{ 'a' in ['a'] + ['b'] }} {{ [1, 2, 3][1:] + [4] }} {{ [1, 2, 3][::2] }} {{ (1, 2, 3)[1:] }}",
    "{{ x.a[1:3] }} {{ x.a[-2:] }} {{ [3, 1].index(1) }} {{ [1, 1].count(1) }} {{ (1, 2).index(2) }} {{ x.c.copy() }}",
    "{{ [3, 1].index(2) }}",
    "{{ messages | length }}{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'in', ['user', 'system']) | list | length }}{{ (messages | last).content }}",
    "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}",
    "{{- '\\n' -}}  {{- 'a' }}  \n  {{ 'b' -}}  \n c",
    "{%- set content = '<think>\\na\\n</think>\\n\\nb' %}{{ content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}|{{ content.split('</think>')[-1].lstrip('\\n') }}",
    "{{ 'a' if enable_thinking is defined and enable_thinking is false else 'b' }}{{ messages[0].content if messages[0].content is string else '' }}",
    "{{ '<|' }}{{ 'a|b' }}{{ '}}' }}{{ '{#' }}{# {{ '#' }} #}{{ \"%}\" }}",
    "{% set f = 'a' %}{{ f ~ \"'\" ~ f }}{{ {'a': '}}'}['a'] }}{% if '%}' %}b{% endif %}",
    "{% import 'a' as b %}",
    "{{ loop is defined }}{{ range is defined }}{{ namespace is defined }}",
    "{{ ''.__class__ is defined }}",
    "{{ x.__class__ is defined }}{{ messages.__len__ is defined }}",
]

# Templates of the kinds that models have.
SOURCES += [
    # Tools with their schemas, a date, and the first message of the user.
    """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if calls[0]['role'] == 'system' %}
    {%- set system_message = calls[0]['content']|trim %}
    {%- set turns = calls[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- for t in tools %}
    {{- t | tojson(indent=4) }}
    {{- "\\n\\n" }}
{%- endfor %}
{{- system_message }}
{%- for message in turns %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>\\n\\n' }}{% if message.content is string %}{{ message['content'] | trim }}{% else %}{{ message.content | tojson }}{% endif %}
    {%- elif 'tool_calls' in message and message.tool_calls|length >= 1 %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {%- for arg_name, arg_val in tool_call.arguments | items %}
            {{- arg_name + '="' ~ arg_val ~ '"' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
""",
    # Tool responses between turns, and what was thought before an answer.
    """{%- set ns = namespace(multi_step_tool=true, last_query_index=calls|length - 1) %}
{%- for forward_message in calls %}
    {%- set index = (calls|length - 1) - loop.index0 %}
    {%- set message = calls[index] %}
    {%- set current_content = message.content if message.content is defined and message.content is string else '' %}
    {%- set tool_start = '<tool_response>' %}
    {%- set tool_start_length = tool_start|length %}
    {%- set start_of_message = current_content[:tool_start_length] %}
    {%- set tool_end = '</tool_response>' %}
    {%- set start_pos = (current_content|length) - (tool_end|length) %}
    {%- if start_pos < 0 %}
        {%- set start_pos = 0 %}
    {%- endif %}
    {%- set end_of_message = current_content[start_pos:] %}
    {%- if ns.multi_step_tool and message.role == "user" and not(start_of_message == tool_start and end_of_message == tool_end) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{{- ns.last_query_index }}
{%- for message in calls %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- for tool_call in message.tool_calls %}
            {%- if (loop.first and content) or (not loop.first) %}
                {{- '\\n' }}
            {%- endif %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (calls[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (calls[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    # Roles that alternate, without the turns of tools, and schemas written key by key.
    """{%- if calls[0]["role"] == "system" %}
    {%- set system_message = calls[0]["content"] %}
    {%- set loop_messages = calls[1:] %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none and message.tool_calls | length > 0)) %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- ns.index }}
{%- for message in loop_messages | rejectattr("role", "equalto", "tool") | rejectattr("role", "equalto", "tool_results") | selectattr("tool_calls", "undefined") %}
    {{- message.role }}
{%- endfor %}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 2 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 2!") }}
        {%- endif %}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
""",
    # Content in parts, and a system's message before the first one.
    """{%- if calls[0]['role'] == 'system' -%}
    {%- if calls[0]['content'] is string -%}
        {%- set first_user_prefix = calls[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = calls[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = calls[1:] -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
""",
    # Types of parameters, by macros that call each other.
    """{%- macro type_of(spec, required, is_nullable=false) -%}
    {%- if spec.type == "array" -%}
        {{- type_of(spec['items'], required) + "[]" }}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string and spec.type is not mapping and spec.type[0] is defined -%}
        {{- spec.type | join(" | ") }}
    {%- elif spec.type == "string" -%}
        {%- if spec.enum -%}
            {{- '"' + spec.enum|join('" | "') + '"' -}}
        {%- else -%}
            {{- "string" }}{%- if is_nullable %}{{- " | null" }}{%- endif -%}
        {%- endif -%}
    {%- elif spec.type == "integer" -%}
        {{- "number" }}
    {%- elif spec.type == "object" -%}
        {{- "{\\n" }}
        {%- for name, property in spec.properties.items() -%}
            {{- name -}}
            {%- if name not in (spec.required or []) -%}
                {{- "?" }}
            {%- endif -%}
            {{- ": " }}
            {{- type_of(property, spec.required or []) }}
            {%- if not loop.last -%}
                {{- ", " }}
            {%- endif -%}
        {%- endfor -%}
        {{- "}" }}
    {%- else -%}
        {{- "any" }}
    {%- endif -%}
{%- endmacro -%}
{%- for tool in tools %}{%- set tool = tool.function %}
{{- "// " + tool.description + "\\n" }}
{{- "type " + tool.name + " = (_: " + type_of(tool.parameters, []) + ") => any;\\n" }}
{%- endfor %}
{{- type_of({"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}, []) }} {{ type_of({"type": ["string", "null"]}, []) }} {{ type_of({"type": "string"}, [], is_nullable=true) }} {{ type_of({}, []) }}
""",
    # Marks of what is generated, and a conversation without them.
    "{% for m in calls %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' }}{% generation %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | map(attribute='function') | map(attribute='name') | join(', ') }}{% endif %}{{ eos_token + '\\n' }}{% endgeneration %}{% elif m.content is string %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '\\n' }}{% endif %}{% endfor %}",
    "{% if calls|length > 100 %}{{ raise_exception('x') }}{% endif %}{% set ns = namespace(is_first=false, prompt='', parts=[]) %}{% for m in calls %}{% if m['role'] == 'system' %}{% set ns.prompt = m['content'] %}{% endif %}{% set ns.parts = ns.parts + [m.role] %}{% endfor %}{{ bos_token }}{{ ns.prompt }}{{ ns.parts }}{{ ns.parts | unique | list | length }}{{ (ns.parts | join('')).count('a') }}",
]


def rendered(source):
    try:
        template = _compile_jinja_template(source)
        return {"source": source, "text": template.render(strftime_now=DATE.strftime, **CONTEXT)}
    except Exception as error:
        return {"source": source, "error": f"{type(error).__name__}: {error}"}


def main():
    golden = {
        "jinja2": jinja2.__version__,
        "transformers": transformers.__version__,
        "context": CONTEXT,
        "cases": [rendered(source) for source in SOURCES],
    }
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("jinja.json")
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
