//! Templates that would take all memory, all time or all of the stack end in a text or in a typed error.

#[path = "../../kernels/tests/counting/mod.rs"]
mod counting;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use instruct::{Chat, Error, RecordError, Template};
use models::SpecialTokens;
use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde_json::json;

const MAX_BYTES: usize = 64 << 20;
const MAX_TIME: Duration = Duration::from_secs(2);

/// The allocator counts the bytes of all threads.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Parses and renders a template within the bounds.
fn rendered(source: &str) -> instruct::Result<String> {
    let mut text = None;
    let start = Instant::now();
    let peak = counting::peak_of(|| {
        let chat = Chat::new(source, &SpecialTokens::default());
        text = Some(chat.and_then(|chat| chat.prompt("Hello?")));
    });
    let time = start.elapsed();
    let shown: String = source.chars().take(500).collect();
    assert!(time < MAX_TIME, "{time:?}: {shown}");
    assert!(peak < MAX_BYTES, "{peak} bytes: {shown}");
    let text = text.unwrap();
    if let Err(error) = &text {
        let is_typed = matches!(
            error,
            Error::Template { .. }
                | Error::Record {
                    problem: RecordError::Render { .. } | RecordError::Limit { .. },
                    ..
                }
        );
        assert!(is_typed, "{error}: {shown}");
    }
    text
}

fn looped(n: usize, body: &str, end: &str) -> String {
    format!(
        "{{% set ns = namespace(x=[1], s='ab') %}}{{% for i in range({n}) %}}{body}{{% endfor %}}{end}"
    )
}

const STEPS: &str = "steps (of an instruction or 64 bytes)";
const BYTES: &str = "a value has more than";
const DEPTH: &str = "a value nests more than 150 levels deep";
const NAMESPACE: &str = "a namespace or a loop is no value";
const TOKENS: &str = "a tag has more than 1024 tokens";
const LIMIT: &str = "is stopped: ";
const TEXT: &str = "";
/// A text or any typed error.
const ANY: &str = "*";

/// Templates, each with a part of the error in which it must end, [`TEXT`], or [`ANY`].
#[allow(clippy::too_many_lines, reason = "a table")]
fn table() -> Vec<(String, &'static str)> {
    let doubled = |body: &str, end: &str| looped(40, body, end);
    let wide = "{% set w = range(5000)|list %}";
    let long = "{% set s = 'ab' * 100000 %}";
    let mut cases: Vec<(String, &str)> = vec![
        // A namespace that contains itself, in several ways.
        (looped(1, "{% set ns.x = ns %}", "{{ ns }}"), NAMESPACE),
        (looped(1, "{% set ns.x = [ns] %}", "{{ ns.x }}"), NAMESPACE),
        (looped(1, "{% set ns.x = {'a': (1, ns)} %}", ""), NAMESPACE),
        (looped(1, "{% set ns.x = ns.items() %}", "{{ ns.x }}"), TEXT),
        (looped(1, "{% set m = ns %}{% set ns.x = m %}", ""), NAMESPACE),
        (looped(1, "{% set ns.x = ns|default(1) %}", ""), NAMESPACE),
        (looped(1, "{% set ns.x = ns if true else 1 %}", ""), NAMESPACE),
        (looped(1, "{% set ns.x = (ns) or 1 %}", ""), NAMESPACE),
        (looped(1, "{% set m = namespace(x=ns) %}{% set ns.x = m %}", ""), NAMESPACE),
        (looped(1, "{% set ns.x = loop %}", ""), NAMESPACE),
        (looped(2, "{% set _ = loop.changed(loop) %}", ""), NAMESPACE),
        (looped(1, "{% macro m(a) %}{% set ns.x = a %}{% endmacro %}{{ m(ns) }}", ""), NAMESPACE),
        // Source that nests.
        (format!("{{{{ {}1 }}}}", "-".repeat(20_000)), TOKENS),
        (format!("{{{{ {}1 }}}}", "-".repeat(1000)), TEXT),
        (format!("{{{{ {}1 }}}}", "not ".repeat(20_000)), TOKENS),
        (format!("{{{{ {}1 }}}}", "not ".repeat(1000)), TEXT),
        (format!("{{{{ {}1{} }}}}", "[".repeat(20_000), "]".repeat(20_000)), TOKENS),
        (format!("{{{{ {}1{} }}}}", "(".repeat(500), ")".repeat(500)), "recursion limits"),
        (format!("{{{{ 1{} }}}}", "+1".repeat(20_000)), TOKENS),
        (format!("{{{{ x{} }}}}", "+x".repeat(500)), "tried to use + operator"),
        (format!("{{{{ x{} }}}}", ".x".repeat(500)), "undefined"),
        (format!("{{{{ 1{} }}}}", "|abs".repeat(500)), TEXT),
        (format!("{{{{ 1{} }}}}", " is defined".repeat(500)), TEXT),
        (format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(250)), TEXT),
        (format!("{{% set {}a{} = 1 %}}", "(".repeat(500), ")".repeat(500)), TEXT),
        ("{% if 1 %}".repeat(9000) + "{% endif %}", "recursion limits"),
        (format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(9000)), "`elif`"),
        (format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(500)), TEXT),
        ("x".repeat(200_000), "the template has 200000 bytes"),
        ("{{ [".repeat(30_000), TOKENS),
        ("{{ 1 }}".repeat(18_000), TEXT),
        ("{% set a = [[],[],[],[]] %}".repeat(4000), TEXT),
        ("{% macro m(a, b=[1]) %}{{ a }}{% endmacro %}".repeat(2900), TEXT),
        // Constants that the parser would compute.
        ("{{ [0] * 100000000 == [1] * 100000000 }}".into(), "only strings and numbers"),
        ("{{ 1 in [0] * 100000000 }}".into(), "only strings and numbers"),
        ("{{ ('a' * 1024) * 1024 * 1024 }}".into(), STEPS),
        ("{{ 9 ** 9 ** 9 }}".into(), "unable to calculate"),
        // Formats.
        ("{{ '{:3000000000}'.format(1) }}".into(), BYTES),
        ("{{ '{:.3000000000f}'.format(1) }}".into(), BYTES),
        ("{{ '%3000000000d'|format(1) }}".into(), BYTES),
        ("{{ '%.99999999999999999999d'|format(1) }}".into(), "invalid integer"),
        (format!("{long}{{{{ ('{{0}}' * 10000).format(s) }}}}"), BYTES),
        (format!("{long}{{{{ ('%(a)s' * 10000)|format({{'a': s}}) }}}}"), BYTES),
        ("{{ [1]|tojson(indent=100000) }}".into(), TEXT),
        ("{{ range(1000)|list|tojson(indent=100000) }}".into(), BYTES),
        ("{{ [1]|tojson(indent=99999999999999) }}".into(), BYTES),
        ("{{ [1]|tojson(false, 99999999999999) }}".into(), BYTES),
        ("{{ ('é' * 100000)|tojson(true)|tojson(true) }}".into(), LIMIT),
        (format!("{wide}{{{{ w|tojson(separators=('s' * 1000, ':')) }}}}"), BYTES),
        (format!("{{{{ {}w{}|tojson(false, 16) }}}}", "[".repeat(60), "]".repeat(60)).replace("{{ ", &format!("{wide}{{{{ ")), BYTES),
        ("{{ 'a\nb'|indent(3000000000) }}".into(), BYTES),
        // Lists, maps and strings that double.
        (doubled("{% set ns.x = ns.x + ns.x %}", "{{ ns.x|length }}"), BYTES),
        (doubled("{% set ns.x = [ns.x, ns.x] %}", "{{ ns.x }}"), BYTES),
        (doubled("{% set ns.x = (ns.x, ns.x) %}", "{{ ns.x }}"), BYTES),
        (doubled("{% set ns.x = {'a': ns.x, 'b': ns.x} %}", "{{ ns.x|tojson }}"), BYTES),
        (doubled("{% set ns.x = dict(a=ns.x, b=ns.x) %}", "{{ ns.x }}"), BYTES),
        (doubled("{% set ns.x = [ns.x, ns.x]|list %}", "{{ ns.x == [ns.x] }}"), LIMIT),
        (doubled("{% set ns.x = (ns.x + ns.x)[::-1] %}", "{{ ns.x|length }}"), LIMIT),
        (doubled("{% set ns.x = [ns.x, ns.x]|batch(1)|list %}", ""), LIMIT),
        (doubled("{% set ns.x = ns.x|zip(ns.x)|list %}", "{{ ns.x }}"), LIMIT),
        (doubled("{% set ns.x = ns.x|chain(ns.x) %}", ""), "filter chain is unknown"),
        (doubled("{% set ns.s = ns.s + ns.s %}", ""), LIMIT),
        (doubled("{% set ns.s = ns.s ~ ns.s %}", ""), LIMIT),
        (doubled("{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}", ""), LIMIT),
        (doubled("{% set ns.s = ns.s.replace('', ns.s) %}", ""), LIMIT),
        (doubled("{% set ns.s = ns.s|replace('', ns.s) %}", ""), LIMIT),
        (doubled("{% set ns.s = ns.s.join(ns.s) %}", ""), LIMIT),
        (doubled("{% set ns.s = ns.s|join(ns.s) %}", ""), LIMIT),
        (doubled("{% set ns.s = [ns.s, ns.s]|join %}", ""), LIMIT),
        (doubled("{% set ns.s = [ns.s, ns.s]|string %}", ""), LIMIT),
        (doubled("{% set ns.s = [ns.s]|tojson|tojson %}", ""), LIMIT),
        (doubled("{% set ns.s = ns.s|upper ~ ns.s|title %}", ""), LIMIT),
        (doubled("{% set ns.s = '%s%s'|format(ns.s, ns.s) %}", ""), LIMIT),
        ("{% macro m(x) %}{{ m(x + x) }}{% endmacro %}{{ m([1]) }}".into(), LIMIT),
        ("{% macro m(x) %}{{ m([x, x]) }}{% endmacro %}{{ m(1) }}".into(), LIMIT),
        ("{% macro m(x) %}{{ m(x) }}{{ m(x) }}{% endmacro %}{{ m(1) }}".into(), "recursion limit"),
        ("{% for x in [[1]] recursive %}{{ loop([x + x]) }}{% endfor %}".into(), LIMIT),
        ("{% macro m() %}{{ caller() }}{% call m() %}{% endcall %}{% endmacro %}{% call m() %}a{% endcall %}".into(), "recursion limit"),
        (format!("{}{{{{ a }}}}", "{% set a = [1] %}".to_owned() + &"{% set a = [a, a] %}".repeat(60)), LIMIT),
        // Values that nest.
        (looped(10_000, "{% set ns.x = [ns.x] %}", "{{ ns.x }}"), DEPTH),
        (looped(10_000, "{% set ns.x = {'a': ns.x} %}", "{{ ns.x }}"), DEPTH),
        (looped(10_000, "{% set ns.x = (ns.x,) %}", "{{ ns.x }}"), DEPTH),
        (looped(10_000, "{% set ns.x = ns.x[0:] %}", "{{ ns.x }}"), TEXT),
        (looped(10_000, "{% set ns.x = ns.x * 1 %}", "{{ ns.x }}"), "only strings and numbers"),
        (looped(10_000, "{% set ns.x = ns.x|map('abs') %}", "{{ ns.x }}"), TEXT),
        (looped(10_000, "{% set ns.x = {'a': ns.x}.values() %}", "{{ ns.x }}"), DEPTH),
        (looped(10_000, "{% set ns.x = ns.x|groupby('a') %}", "{{ ns.x }}"), DEPTH),
        ("{% set a = 1 %}".to_owned() + &"{% set a = [a] %}".repeat(7000) + "{{ a }}", DEPTH),
        // Much work in few steps.
        ("{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}".into(), LIMIT),
        (format!("{wide}{{% for i in range(10000) %}}{{% if w == w + [] %}}{{% endif %}}{{% endfor %}}"), LIMIT),
        (format!("{wide}{{% for i in range(10000) %}}{{% if -1 in w %}}{{% endif %}}{{% endfor %}}"), LIMIT),
        (format!("{wide}{{% for i in range(10000) %}}{{% set x = w|sort %}}{{% endfor %}}"), LIMIT),
        (format!("{wide}{{% for i in range(10000) %}}{{% set x = w.count(1) %}}{{% endfor %}}"), LIMIT),
        (format!("{wide}{{% for i in range(10000) %}}{{% set x = w|join %}}{{% endfor %}}"), LIMIT),
        (format!("{wide}{{% for i in range(10000) %}}{{% set x = dict(**{{'a': w}}) %}}{{% endfor %}}"), LIMIT),
        (format!("{wide}{{% for i in range(10000) %}}{{% if loop.changed(w + []) %}}{{% endif %}}{{% endfor %}}"), LIMIT),
        (format!("{long}{{% for i in range(10000) %}}{{% if s[1:] == s[:-1] %}}{{% endif %}}{{% endfor %}}"), LIMIT),
        (format!("{long}{{% for i in range(10000) %}}{{% if s[0:1] %}}{{% endif %}}{{% endfor %}}"), LIMIT),
        (format!("{long}{{% for i in range(10000) %}}{{% if 'c' in s %}}{{% endif %}}{{% endfor %}}"), LIMIT),
        (format!("{long}{{% for i in range(10000) %}}{{% if s.find('c') %}}{{% endif %}}{{% endfor %}}"), LIMIT),
        (format!("{long}{{% for i in range(10000) %}}{{% if s is eq s %}}{{% endif %}}{{% endfor %}}"), LIMIT),
        (format!("{long}{{% for i in range(10000) %}}{{% if 1 is in [s] %}}{{% endif %}}{{% endfor %}}"), LIMIT),
        (format!("{long}{{% for i in range(10000) %}}{{% if {{s: 1}}[s] %}}{{% endif %}}{{% endfor %}}"), LIMIT),
        (format!("{long}{{{{ s.split('')|length }}}}"), "a separator that is not empty"),
        (format!("{long}{{{{ s|list|length }}}}"), TEXT),
        (format!("{long}{{{{ s[::-1]|length }}}}"), TEXT),
        (format!("{long}{{{{ ('\n' * 100000).splitlines()|length }}}}"), LIMIT),
        (format!("{long}{{{{ s.strip(s)|length }}}}"), "to strip"),
        (format!("{long}{{{{ s|trim(s)|length }}}}"), "to strip"),
        (format!("{long}{{{{ s|wordcount }}}}"), TEXT),
        (format!("{long}{{{{ s.center(99999999999) }}}}"), BYTES),
        (format!("{long}{{{{ s.zfill(99999999999) }}}}"), BYTES),
        ("{{ ('\\t' * 10000).expandtabs(99999999999) }}".into(), BYTES),
        (format!("{long}{{{{ s|indent(s) }}}}"), TEXT),
        ("{{ ('a\n' * 10000)|indent('b' * 10000) }}".into(), BYTES),
        ("{{ '%3000000000d' % 1 }}".into(), BYTES),
        (doubled("{% set ns.s = '%s%s' % (ns.s, ns.s) %}", ""), LIMIT),
        (doubled("{% set ns.x = dict(a=ns.x, b=ns.x).items() %}", ""), LIMIT),
        (doubled("{% generation %}{% set ns.s = ns.s ~ ns.s %}{% endgeneration %}", ""), LIMIT),
        ("{{ [1]|batch(1000000000, 0)|list }}".into(), LIMIT),
        ("{{ [1]|slice(1000000000, 0)|list }}".into(), LIMIT),
        ("{{ range(0, 1000000000) }}".into(), "range has too many elements"),
        ("{{ range(9223372036854775807, -9223372036854775807, -9223372036854775808) }}".into(), ANY),
        ("{{ debug() }}".into(), "debug is unknown"),
        ("{{ [[1]]|pprint }}".into(), "filter pprint is unknown"),
        ("{{ [[1]] * 40 }}".into(), "only strings and numbers"),
        ("{% include 'chat' %}".into(), "the statement include is not supported"),
        ("{% extends 'chat' %}".into(), "the statement extends is not supported"),
        ("{% block a %}{{ self.a() }}{% endblock %}".into(), "the statement block is not supported"),
        ("{% for i in [1] %}{{ loop.cycle() }}{% endfor %}".into(), "the template engine failed"),
        (format!("{long}{{{{ raise_exception(s) }}}}"), "ab…"),
        // Brackets and strings in which a check could be lost.
        ("{% set a = 'x' %}{{ a[[1, 2][0:1]|length - 1:][0] }}".into(), TEXT),
        (doubled("{% set ns.x = ns.x+ns.x if(ns.x)else[] %}", "{{ ns.x|length }}"), LIMIT),
        (doubled("{%set ns.x=(ns.x)+(ns.x)%}", ""), LIMIT),
        (doubled("{% set ns.x = [*ns.x, *ns.x] %}", ""), "unexpected"),
        (doubled("{% set ns.x = [] if [ns.x, ns.x] is eq [ns.x, ns.x] else [] %}{% set ns.x = [ns.x, ns.x] %}", ""), TEXT),
    ];
    // Filters on a list that shares its parts.
    for filter in [
        "first",
        "last",
        "min",
        "max",
        "sum",
        "unique",
        "reverse",
        "dictsort",
        "items",
        "string",
        "list",
        "tojson",
        "join",
        "sort",
        "map('string')",
        "groupby(0)",
        "batch(2)",
        "slice(2)",
    ] {
        let end = format!("{{{{ ns.x|{filter} }}}}");
        cases.push((looped(14, "{% set ns.x = [ns.x, ns.x] %}", &end), ANY));
    }
    cases
}

#[test]
fn every_template_ends_within_its_bounds() {
    let _guard = ONE_AT_A_TIME.lock();
    let cases = table();
    assert!(cases.len() > 100);
    let mut wrong = Vec::new();
    for (source, expected) in cases {
        let shown: String = source.chars().take(200).collect();
        match rendered(&source) {
            Ok(_) if expected == TEXT => (),
            Err(error) if expected != TEXT && error.to_string().contains(expected) => (),
            _ if expected == ANY => (),
            Ok(text) => wrong.push(format!("text of {} bytes: {shown}", text.len())),
            Err(error) => wrong.push(format!("{error}: {shown}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A random expression that makes a text, of a few operations.
fn text(random: &mut ChaCha8Rng, depth: usize) -> String {
    if depth == 0 {
        return (*["ns.s", "'é\\n'", "i"].choose(random).unwrap()).into();
    }
    let (s, t) = (text(random, depth - 1), text(random, depth - 1));
    let x = list(random, depth - 1);
    let forms = [
        format!("({s} ~ {x})"),
        format!("({s} ~ {t})"),
        "'ab' * i".into(),
        format!("({s})|replace('', {t})"),
        "'é'.replace('', ns.s)".into(),
        format!("', '.join({x})"),
        format!("({x})|join({t})"),
        format!("({x})|string"),
        format!("({x})|tojson(indent=i)"),
        format!("({s})|indent(i)"),
        format!("({s})|upper"),
        format!("(({s})|string)[1:]"),
        format!("(({s})|string)[::-1]"),
        format!("'{{0}}{{1:>999}}{{0}}'.format({x}, {t})"),
        format!("m({x})"),
        format!("(({s}) if ({x}) == ({x}) else ({t}))"),
    ];
    forms.choose(random).unwrap().clone()
}

/// A random expression that makes a list.
fn list(random: &mut ChaCha8Rng, depth: usize) -> String {
    if depth == 0 {
        return (*["ns.x", "messages", "[i]"].choose(random).unwrap()).into();
    }
    let (x, y) = (list(random, depth - 1), list(random, depth - 1));
    let s = text(random, depth - 1);
    let forms = [
        format!("({x} + {y})"),
        format!("[{x}, {s}, {x}]"),
        format!("[({x}, {y})]"),
        format!("[{{'k': {x}, {s}: {y}}}]"),
        format!("({x})[1:]"),
        format!("({x})[::-1]"),
        "ns.s.split()".into(),
        format!("({s})|string|list"),
        format!("({x})|batch(2, {s})|list"),
        format!("({x})|slice(3)|list"),
        format!("({x})|map('string')|list"),
        format!("({x})|sort"),
        format!("({x})|unique|list"),
        format!("({x})|reverse|list"),
        format!("({x})|zip({y})|list"),
        format!("{{'k': {x}}}.items()|list"),
        format!("dict(k={x}).values()|list"),
        format!("[({s}) in ({x})]"),
        "range(i)|list".into(),
    ];
    forms.choose(random).unwrap().clone()
}

/// A random template, whose loops feed the results of expressions to the same expressions.
fn template(random: &mut ChaCha8Rng) -> String {
    let mut source = String::from(
        "{% set ns = namespace(x=[1], s='ab') %}{% macro m(a) %}{{ a }}{% endmacro %}",
    );
    for _ in 0..random.random_range(1..3) {
        let n = [3, 50, 10_000].choose(random).unwrap();
        source += &format!("{{% for i in range({n}) %}}");
        for _ in 0..random.random_range(1..4) {
            let (s, x) = (text(random, 2), list(random, 2));
            source += &match random.random_range(0..4) {
                0 => format!("{{% set ns.s %}}{{{{ {s} }}}}{{% endset %}}"),
                1 => format!("{{{{ {x} }}}}"),
                2 => format!("{{% set ns.s = ({s})|string %}}"),
                _ => format!("{{% set ns.x = {x} %}}"),
            };
        }
        source += "{% endfor %}";
    }
    source
}

#[test]
fn random_templates_end_within_their_bounds() {
    let _guard = ONE_AT_A_TIME.lock();
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let (mut n_texts, mut n_limits) = (0, 0);
    for _ in 0..500 {
        match rendered(&template(&mut random)) {
            Ok(_) => n_texts += 1,
            Err(Error::Record {
                problem: RecordError::Limit { .. },
                ..
            }) => n_limits += 1,
            Err(_) => (),
        }
    }
    assert!(
        n_texts > 20 && n_limits > 20,
        "{n_texts} texts, {n_limits} limits"
    );
}

/// What a template may do grows with what it is given.
#[test]
fn a_long_conversation_is_rendered() {
    let _guard = ONE_AT_A_TIME.lock();
    let source = "{% for m in messages %}{% if '</think>' in m.content %}{% set c = m.content.split('</think>')[-1].lstrip() %}{% else %}{% set c = m['content']|trim %}{% endif %}{{ '<|' + m.role + '|>' + c + '</s>' }}{% endfor %}";
    let chat = Chat::new(source, &SpecialTokens::default()).unwrap();
    let content = "Word ".repeat(1 << 18);
    let messages = ["user", "assistant"].repeat(4);
    let messages: Vec<_> = messages
        .iter()
        .map(|role| json!({"role": role, "content": content}))
        .collect();
    let record = instruct::Record {
        fields: [("messages".into(), json!(messages))].into_iter().collect(),
        path: std::path::Path::new("data.jsonl").into(),
        line: 1,
    };
    let pieces = Template::Chat(chat).pieces(&record).unwrap();
    let n_bytes: usize = pieces.iter().map(|piece| piece.text.len()).sum();
    assert!(n_bytes > 10_000_000);

    // The number of messages is at hand, whatever their number.
    let source = "{% for m in messages %}{% if loop.index0 < messages|length %}{{ messages[loop.index0].role }}{% endif %}{% endfor %}";
    let chat = Chat::new(source, &SpecialTokens::default()).unwrap();
    let messages: Vec<_> = (0..200)
        .map(|at| json!({"role": (["user", "assistant"][at % 2]), "content": "Hi."}))
        .collect();
    let record = instruct::Record {
        fields: [("messages".into(), json!(messages))].into_iter().collect(),
        ..record
    };
    assert_eq!(Template::Chat(chat).pieces(&record).unwrap().len(), 200);
}
