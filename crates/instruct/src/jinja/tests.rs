use super::*;

fn chat(template: &str) -> Result<String, String> {
    let context = BTreeMap::from([(
        "x".to_owned(),
        value(&serde_json::json!(
            {"b": "<a & 'b'> \\u003c \"é\" 語\n", "a": [1, 2.5, -3, true, null, {}, []]}
        )),
    )]);
    let templates = Templates::for_chats("chat", template).map_err(|error| error.to_string())?;
    let rendered = templates.render("chat", Value::from(context));
    rendered.map_err(|error| match error {
        RecordError::Render { problem, .. } | RecordError::Limit { problem, .. } => problem,
        error => panic!("{error}"),
    })
}

/// The constructs of `tests/golden/make_jinja.py`, as Jinja2 renders them.
#[test]
fn constructs_are_those_of_jinja() {
    let golden = include_str!("../../tests/golden/jinja.json");
    let golden: Json = serde_json::from_str(golden).unwrap();
    let context = value(&golden["context"]);
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 150);
    let mut wrong = Vec::new();
    for case in cases {
        let source = case["source"].as_str().unwrap();
        let found = Templates::for_chats("chat", source).map_err(|error| error.to_string());
        let found = found.and_then(|mut templates| {
            templates.set_now(jiff::civil::date(2024, 7, 6).at(0, 0, 0, 0));
            let text = templates.render("chat", context.clone());
            text.map_err(|error| error.to_string())
        });
        let refused = REFUSED.iter().find(|(of, _)| *of == source);
        let is_right = match (&found, case["text"].as_str(), refused) {
            (Err(error), _, Some((_, named))) => error.contains(named),
            (Ok(text), Some(expected), None) => text == expected,
            (Err(_), None, None) => true,
            (Ok(_), None, None) => LENIENT.contains(&source),
            _ => false,
        };
        if !is_right {
            wrong.push(format!("{source:?}:\n  {found:?}\n  {case}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What Jinja2 renders and is refused here, with a part of the error.
const REFUSED: [(&str, &str); 17] = [
    (
        "{{ '{}'.format(1e20) }}",
        "with an exponent is not supported",
    ),
    (
        "{{ '%s %s' | format('a', 1e20) }}",
        "with an exponent is not supported",
    ),
    ("{{ '{!r}'.format('a') }}", "found '!'"),
    ("{{ '%r' % 'a' }}", "invalid conversion type 'r'"),
    (
        "{% for k, v in ['a', 'b'] | groupby(0) %}{{ k }}{{ v }}{% endfor %}",
        "value is not a string",
    ),
    (
        "{% macro m(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, d=5) }}",
        "too many arguments",
    ),
    (
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b",
        "cycler is unknown",
    ),
    ("{{ 'abc'.encode('utf-8') }}", "encode"),
    ("{{ 'ßX'.casefold() }}", "casefold"),
    (
        "{{ 'hello world foo' | truncate(9) }} {{ 'hello world' | truncate(5, true, '') }}",
        "filter truncate is unknown",
    ),
    (
        "{{ 'a long text here' | wordwrap(6) }}",
        "filter wordwrap is unknown",
    ),
    (
        "{{ '<b>x</b> y' | striptags }}",
        "filter striptags is unknown",
    ),
    ("{{ 'a b/é?' | urlencode }}", "filter urlencode is unknown"),
    ("{{ [1, 2] | pprint }}", "filter pprint is unknown"),
    (
        "{{ 123456 | filesizeformat }}",
        "filter filesizeformat is unknown",
    ),
    (
        "{{ {'a': 'x', 'b': none} | xmlattr }}",
        "filter xmlattr is unknown",
    ),
    (
        "{{ range is callable }} {{ x is callable }}",
        "test callable is unknown",
    ),
];

/// What Jinja2 refuses and is rendered here.
const LENIENT: [&str; 1] = ["{{ 1 < 'a' }}"];

#[test]
fn constants_have_the_names_of_python() {
    let template = "{{ x.a[3] }} {{ none }} {{ 1 > 2 }} {{ x.a }} {{ 'x' ~ none ~ true }}";
    let expected = "True None False [1, 2.5, -3, True, None, {}, []] xNoneTrue";
    assert_eq!(chat(template).unwrap(), expected);
}

#[test]
fn a_template_without_end_is_stopped() {
    let loops = "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}";
    let error = chat(loops).unwrap_err();
    assert!(error.starts_with("more than 300"), "{error}");
}

/// A check behind every operand, and no other change.
#[test]
fn sources_with_their_checks() {
    let cases = [
        (
            "a {{ b }}{# {{ c }} #}{% raw %}{{ d }}{% endraw %}",
            "a {{ b|_v  }}{# {{ c }} #}{% raw %}{{ d }}{% endraw %}",
        ),
        ("{{b-}}", "{{b|_v -}}"),
        (
            "{{ 'a' 'b' ~ 1 ~ none ~ 'c'.upper() }}",
            "{{ 'a' 'b'|_t  ~ 1|_t  ~ none|_t  ~ 'c'.upper()|_t  }}",
        ),
        (
            "{{ a ~ b + c ~ d * e ~ 'f' }}",
            "{{ a|_t  ~ b|_t  + c|_t  ~ d|_s  * e|_s  ~ 'f' }}",
        ),
        (
            "{{ '%s' % a }}{{ '%s' % 'b' ~ c }}{{ a % 2 }}{{ 2 * '%s' % a }}",
            "{{ '%s' |_f( a|_v )|_v  }}{{ '%s' |_f( 'b')|_t  ~ c|_t  }}{{ a|_v  % 2 }}{{ 2 * '%s' % a|_v  }}",
        ),
        (
            "{{ ['%s' % (a, -b|f)] % c is eq '%s' % d }}",
            "{{ ['%s' |_f( (a|_v , -b|_v |f|_v )|_v )|_v ]|_v  % c|_v  is eq '%s' % d|_v  }}",
        ),
        (
            "{{ '%s' % a ** b % c * d }}",
            "{{ '%s' |_f( a|_v  ** b|_v )|_v  % c|_s  * d|_s  }}",
        ),
        (r"{{ '\a\'\\' ~ '\n' }}", "{{ '\u{7}\\'\\\\' ~ '\n' }}"),
        (
            "{{ a.b['c'].d(e, f=g, *h, **i).j }}",
            "{{ a.b['c'].d(e|_v , f=g|_v , *h|_v , **i|_v ).j|_v  }}",
        ),
        (
            "{{ a[b].c[1:d][::-1] }}",
            "{{ ((a[b|_v ].c|_v )[1:d|_v ]|_v )[::-1]|_v  }}",
        ),
        ("{{ -a + not b }}", "{{ -a|_v  + not b|_v  }}"),
        (
            "{{ a|length + b|join(c)|f }}",
            "{{ a|length|_v  + b|_v |join(c|_v )|_v |f|_v  }}",
        ),
        (
            "{{ a is defined and b is not eq c and d is in(e) }}",
            "{{ a is defined and b|_v  is not eq (c|_v ) and d|_v  is in(e|_v ) }}",
        ),
        (
            "{{ a is eq -b[1:] }}",
            "{{ a|_v  is eq (-(b|_v )[1:]|_v ) }}",
        ),
        (
            "{{ [a, (b, 1), {'c': d, e: 2}] }}",
            "{{ [a|_v , (b|_v , 1)|_v , {'c': d|_v , e|_v : 2}|_v ]|_v  }}",
        ),
        (
            "{{ a * (b) * -c|f + e }}",
            "{{ a|_s  * (b|_v )|_s  * -c|_v |f|_s  + e|_v  }}",
        ),
        ("{{ a if b else c }}", "{{ a|_v  if b|_v  else c|_v  }}"),
        ("{{ x['a']in b }}", "{{ x['a']|_v in b|_v  }}"),
        (
            "{% if a %}{% elif not b %}{% else %}{% endif %}",
            "{% if a|_v  %}{% elif not b|_v  %}{% else %}{% endif %}",
        ),
        (
            "{% for a, (b, c) in d if e %}{% break %}{% endfor %}",
            "{% for a, (b, c) in d|_v  if e|_v  %}{% break %}{% endfor %}",
        ),
        (
            "{% for a in b recursive %}{% endfor %}",
            "{% for a in b|_v  recursive %}{% endfor %}",
        ),
        (
            "{% set a = b %}{% set a.b = c %}{% set a, b = c, [d] %}",
            "{% set a = b|_h  %}{% set a.b = c|_v  %}{% set a, b = c|_h , [d|_v ]|_h  %}",
        ),
        (
            "{% set a %}{% endset %}{% set a | f(b=c) %}{% endset %}",
            "{% set a %}{% endset %}{% set a | f(b=c|_v )|_h  %}{% endset %}",
        ),
        (
            "{% with a = b, c = [d] %}{% endwith %}",
            "{% with a = b|_h , c = [d|_v ]|_h  %}{% endwith %}",
        ),
        (
            "{% filter f(a)|g %}{% endfilter %}",
            "{% filter f(a|_v )|_v |g|_v  %}{% endfilter %}",
        ),
        (
            "{% macro m(a, b=c) %}{% endmacro %}",
            "{% macro m(a, b=c|_v ) %}{% endmacro %}",
        ),
        (
            "{% call(a, b=c) m(d) %}{% endcall %}{% call m(d) %}{% endcall %}",
            "{% call(a, b=c|_v ) m(d|_v ) %}{% endcall %}{% call m(d|_v ) %}{% endcall %}",
        ),
        ("{% do a.b(c) %}", "{% do a.b(c|_v ) %}"),
        (
            "{%- generation -%}a{%endgeneration%}",
            "{%- with %}{% filter _g -%}a{%endfilter %}{% endwith%}",
        ),
        ("{{ '{% generation %}' }}", "{{ '{% generation %}' }}"),
    ];
    let mut syntax = SyntaxConfig::builder();
    let syntax = built(syntax.trim_blocks(true).lstrip_blocks(true));
    for (source, expected) in cases {
        let guarded = guard::guarded(source, syntax.clone()).unwrap();
        assert_eq!(guarded.source, expected);
    }
}

/// The checks and the replaced filters change no text.
///
/// The texts are those of Jinja2 3.1.6 with the settings of transformers.
#[test]
fn checked_operations_are_those_of_jinja() {
    let cases = [
        (
            "{{ x.a[1:3] }} {{ x.a[::-1][0:2] }} {{ 'éa'[::-1] }}",
            "[2.5, -3] [[], {}] aé",
        ),
        (
            "{{ [1, 2] + [3] == [1, 2, 3] }} {{ (1, 2) + (3,) }}",
            "True (1, 2, 3)",
        ),
        (
            "{{ 'ab' * 2 }} {{ 2 * 3 * 'a' }} {{ 2 * -3 }}",
            "abab aaaaaa -6",
        ),
        (
            "{{ 'a-b'.split('-') }} {{ 'a b'.split()[-1] }} {{ 'a,b,c'.split(',', 1) }}",
            "['a', 'b'] b ['a', 'b,c']",
        ),
        (
            "{{ ' a '.strip() }}{{ 'xax'.strip('x') }}{{ 'a\n'.rstrip('\n') }}{{ ' a'|trim }}",
            "aaaa",
        ),
        (
            "{{ 'aaa'.replace('a', 'b') }} {{ 'aaa'.replace('a', 'b', 2) }} {{ 'aaa'|replace('a', '') }}",
            "bbb bba ",
        ),
        (
            "{{ ', '.join(['a', 'b']) }} {{ ['a', 1]|join('-') }}",
            "a, b a-1",
        ),
        (
            "{{ '{} {:>3}|{a}'.format(1, 'x', a=2) }} {{ '%s %03d'|format('a', 7) }}",
            "1   x|2 a 007",
        ),
        (
            "{{ {'a': 1}.items()|list }} {{ {'a': 1}.get('b', 2) }} {% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
            "[('a', 1)] 2 a1",
        ),
        (
            "{{ [1, 1, 2].count(1) }} {{ [3, 1, 2]|sort }} {{ range(3)|list }}",
            "2 [1, 2, 3] [0, 1, 2]",
        ),
        (
            "{% set n = namespace(a=[]) %}{% for i in range(3) %}{% set n.a = n.a + [i] %}{% endfor %}{{ n.a }} {{ n.a is iterable }}",
            "[0, 1, 2] True",
        ),
        (
            "{% set n = namespace(a=1) %}{% set m = n %}{% set m.a = 2 %}{{ n.a }}",
            "2",
        ),
        (
            "{% macro m(a, b='x') %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}{% call m(3) %}c{% endcall %}",
            "1x123xc",
        ),
        (
            "{% for i in [1, 2] %}{{ loop.index }}{{ loop.last }}{{ loop.previtem }}{% endfor %}",
            "1False2True1",
        ),
        (
            "{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is sequence else a }}{% endfor %}",
            "123",
        ),
        (
            "{% filter upper %}a{% endfilter %}{% set b | trim %} b {% endset %}{{ b }}",
            "Ab",
        ),
        (
            "{{ y }}{{ y is defined }}{{ y|default('d') }}{{ 1 if y }}",
            "Falsed",
        ),
        (
            "{{ 2 is in [1, 2] }} {{ 2 is eq 2 }} {{ 'b' not in 'abc' }} {{ 3 is divisibleby 2 }}",
            "True True False False",
        ),
        ("{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}", "3"),
    ];
    for (template, expected) in cases {
        assert_eq!(chat(template).as_deref(), Ok(expected), "{template}");
    }
}

#[test]
fn there_is_no_clock() {
    let error = chat("\n{{ strftime_now('%d %b %Y') }}").unwrap_err();
    assert_eq!(
        error,
        "strftime_now is unknown: templates cannot read the clock; give the date (line 2 of the template)"
    );
    let llama_3_2 = "{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{%- else %}26 Jul 2024{%- endif %}";
    assert_eq!(chat(llama_3_2).unwrap(), "26 Jul 2024");
    // Not where the name is in another error.
    let raised = chat("{{ raise_exception('no strftime_now') }}").unwrap_err();
    assert!(!raised.contains("give the date"), "{raised}");
}
