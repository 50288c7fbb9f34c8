//! Conversations from files to trained tokens, and templates that cannot or must not be used.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]
#![allow(clippy::format_collect, clippy::single_range_in_vec_init)]

mod data_support;

use std::path::Path;
use std::time::{Duration, Instant};

use data_support::{bytes, write};
use ferrotune::data::{ChatTemplate, Conversation, DataConfig, Reason, Tokenizer, prepare};
use serde_json::{Map, Value, json};
use tempfile::tempdir;

const MARKED: &str = "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}{{ message.content }};{% endgeneration %}{% else %}{{ message.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
const PLAIN: &str = "{% for message in messages %}<{{ message.role }}>{{ message.content }};{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, None, Map::new()).unwrap()
}

fn talk(messages: &Value) -> Conversation {
    Conversation::parse(&messages.to_string(), None).unwrap()
}

fn two_turns() -> Value {
    json!([
        {"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "No?"}, {"role": "assistant", "content": "Ünd"},
    ])
}

/// A folder with a byte tokenizer and this template.
fn tokenizer(folder: &Path, source: &str) -> Tokenizer {
    write(folder, "chat_template.jinja", source);
    write(
        folder,
        "tokenizer_config.json",
        "{\"bos_token\": {\"content\": \"<bos>\"}}",
    );
    bytes(folder, None, None)
}

#[test]
fn the_assistants_tokens_are_trained() {
    let folder = tempdir().unwrap();
    let conversation = talk(&two_turns());
    for (source, expected) in [(MARKED, ["Yes;", "Ünd;"]), (PLAIN, ["Yes;", "Ünd;"])] {
        let tokenizer = tokenizer(folder.path(), source);
        let example = tokenizer.chat(&conversation).unwrap();
        let trained: Vec<String> = example
            .trained()
            .iter()
            .map(|range| {
                let ids = &example.ids()[range.start as usize..range.end as usize];
                tokenizer.decode(ids).unwrap()
            })
            .collect();
        assert_eq!(trained, expected, "{source}");
    }
}

#[test]
fn files_of_conversations_become_rows() {
    let folder = tempdir().unwrap();
    let tokenizer = tokenizer(folder.path(), MARKED);
    let line = |number: usize| {
        json!({"messages": [
            {"role": "user", "content": format!("Question {number}")},
            {"role": "assistant", "content": format!("Answer {number}")},
        ]})
        .to_string()
    };
    let mut lines: Vec<String> = (0..40).map(line).collect();
    lines.push(json!({"messages": [{"role": "user", "content": "Alone"}]}).to_string());
    let data = write(folder.path(), "a.jsonl", lines.join("\n"));
    let config = json!({
        "data": [data], "heldout": 0.2, "sequence_length": 200, "packing": true, "seed": 1,
    });
    let config: DataConfig = serde_json::from_value(config).unwrap();
    let prepared = prepare(&config, &tokenizer).unwrap();
    assert_eq!(prepared.report.records, 40);
    assert_eq!(
        prepared.report.skipped[0].reason,
        "no turn of an assistant, which is what is trained"
    );
    let answers: usize = (0..40)
        .map(|number| format!("Answer {number};").len())
        .sum();
    assert_eq!(
        prepared.report.train_targets + prepared.report.heldout_targets,
        answers
    );
    // Without a template there is one reason for all of them.
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    let error = prepare(&config, &bytes(folder.path(), None, None))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("the tokenizer has no chat template"),
        "{error}"
    );
}

#[test]
fn templates_are_found_where_transformers_looks() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let rendered = |messages: &Value, tools: Option<&str>| {
        let template = ChatTemplate::from_folder(at).unwrap().unwrap();
        let conversation = Conversation::parse(&messages.to_string(), tools).unwrap();
        template.render(&conversation, false).unwrap()
    };
    let hello = json!([{"role": "user", "content": "Hi"}]);
    assert!(ChatTemplate::from_folder(at).unwrap().is_none());
    write(
        at,
        "tokenizer_config.json",
        json!({"chat_template": "config {{ eos_token }}", "eos_token": "</s>"}).to_string(),
    );
    assert_eq!(rendered(&hello, None), "config </s>");
    let named = json!({"chat_template": [
        {"name": "default", "template": "default"}, {"name": "tool_use", "template": "tools {{ tools | length }}"},
    ]});
    write(at, "tokenizer_config.json", named.to_string());
    assert_eq!(rendered(&hello, None), "default");
    assert_eq!(rendered(&hello, Some("[{}, {}]")), "tools 2");
    write(at, "chat_template.jinja", "file");
    assert_eq!(rendered(&hello, Some("[{}]")), "file");

    std::fs::remove_file(at.join("chat_template.jinja")).unwrap();
    for (config, expected) in [
        (json!({"chat_template": 5}), "neither a template nor a list"),
        (
            json!({"chat_template": [{"name": "rag", "template": ""}]}),
            "no template named `default`",
        ),
        (
            json!({"chat_template": "{% if %}"}),
            "the chat template cannot be read: line 1",
        ),
    ] {
        write(at, "tokenizer_config.json", config.to_string());
        let error = ChatTemplate::from_folder(at).unwrap_err().to_string();
        assert!(
            error.contains("tokenizer_config.json") && error.contains(expected),
            "{error}"
        );
    }
    write(at, "tokenizer_config.json", "{");
    assert!(
        ChatTemplate::from_folder(at)
            .unwrap_err()
            .to_string()
            .contains("not valid JSON")
    );
}

#[test]
fn a_template_that_changes_earlier_turns_says_so() {
    let source = "{% for message in messages %}{{ message.content }}{% if loop.last %}!{% endif %};{% endfor %}";
    let error = template(source)
        .spans(&talk(&two_turns()))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("has no {% generation %} markers, and renders turn 2 otherwise"),
        "{error}"
    );
    let alone = talk(&json!([{"role": "user", "content": "x"}]));
    assert_eq!(template(PLAIN).spans(&alone), Err(Reason::NoAssistant));
}

#[test]
fn text_that_looks_like_a_mark_is_text() {
    let odd = json!([
        {"role": "user", "content": "\u{fdd0}a\u{fdd1}"}, {"role": "assistant", "content": "\u{fdd2}é"},
    ]);
    let (text, spans) = template(MARKED).spans(&talk(&odd)).unwrap();
    assert!(text.contains("\u{fdd0}a\u{fdd1}"));
    let characters: Vec<char> = text.chars().collect();
    let assistant: String = characters[spans[0].clone()].iter().collect();
    assert_eq!((spans.len(), assistant.as_str()), (1, "\u{fdd2}é;"));
}

/// Operators, filters and slices are counted, and mean what they mean in Python.
#[test]
fn counted_templates_render_as_ever() {
    let conversation = talk(&two_turns());
    let cases = [
        ("{{ '1' + 2 * 3 ~ 'a' + 'b' }}", "16ab"),
        ("{{ (1 ~ 2) ~ (3 ~ '~' ~ (4 ~ 5)) }}", "123~45"),
        (
            "{{ true ~ none ~ 1.0 ~ ['a'] ~ {'k': 1} ~ absent }}",
            "TrueNone1.0['a']{'k': 1}",
        ),
        ("{{ ('a' ~ 'b').upper() ~ 'c'|upper ~ -1 }}", "ABC-1"),
        ("{{ ([1, 2, 3][1:] + [4])[0] + 'abc'[::2]|length }}", "4"),
        ("{{ 'abcdef'[1:][1:][0] }}{{ 'a-b'[:2].strip('-') }}", "ca"),
        (
            "{{ 'x' if 'a' ~ 'b' == 'ab' and 'ab' in 'a' ~ 'b' else 'y' }}",
            "x",
        ),
        (
            "{% set x | upper %}a{{ 'b' ~ 'c' }}{% endset %}{{ x }}",
            "ABC",
        ),
        (
            "{% macro m(a, b='x' ~ 'y') %}{{ a + b }}{% endmacro %}{{ m('1' ~ '2') }}",
            "12xy",
        ),
        (
            "{% for a in [1] + [2] if a ~ '' == '2' %}{{ a }}{% endfor %}",
            "2",
        ),
        (
            "{{ [a|default('d') ~ 1, 2][0] }}{{ {'k': 'a' + 'b'}['k'] }}",
            "d1ab",
        ),
        ("{%- filter upper %}a{{ 1 + 1 }}{% endfilter -%}", "A2"),
        (
            "{{ '%s-%03d' | format('é', 7) }}{{ '{:.2f}|{}'.format(1.5, 'x') }}",
            "é-0071.50|x",
        ),
        ("{{ 'a' ~\n  'b'\n  ~ 'c' }}", "abc"),
        (
            "{{ 1 < 2 < 3 }}{{ 2 == 1 + 1 and 'b' not in 'a' ~ 'c' }}{{ not 1 != -1 }}",
            "TrueTrueFalse",
        ),
        (
            "{{ 4 is divisibleby 2 }}{{ (1 + 1) is eq(2) or x is defined }}{{ x is not defined }}",
            "TrueTrueTrue",
        ),
        (
            "{{ 'abc'[:][0] }}{{ 'abc' [ : : -1 ] [0] }}{{ 'abc'[1:][:].upper() }}{{ ('a' ~ 'bc')[-2:-1][0] }}",
            "acBCb",
        ),
    ];
    for (source, expected) in cases {
        assert_eq!(
            template(source).render(&conversation, false).unwrap(),
            expected,
            "{source}"
        );
    }
    let long = format!("{{{{ 'a'{} }}}}", " ~ 'a'".repeat(150));
    let text = template(&long).render(&conversation, false).unwrap();
    assert_eq!(text, "a".repeat(151));
    let sum = format!("{{{{ 1{} }}}}", " + 1".repeat(150));
    let text = template(&sum).render(&conversation, false).unwrap();
    assert_eq!(text, "151");
}

/// Templates of strangers, and what the error says.
const HOSTILE: &[(&str, &str)] = &[
    (
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "does not come to an end",
    ),
    (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "recursion",
    ),
    (
        "{% for a in range(90000) %}{{ 'x' * 90000 }}{% endfor %}",
        "writes more than 64 MiB",
    ),
    ("{{ 'x' * 999999999999 }}", "too large"),
    ("{{ range(999999999) | list }}", "range"),
    (
        "{{ 'a' | indent(999999999999) }}",
        "an indentation of 999999999999",
    ),
    (
        "{{ [1] | tojson(indent=999999999999) }}",
        "an indentation of 999999999999",
    ),
    (
        "{{ ('a' * 9000) | replace('a', 'b' * 9000) }}",
        "a text of more than 64 MiB",
    ),
    (
        "{{ range(9000) | join('b' * 9000) }}",
        "a text of more than 64 MiB",
    ),
    // What grows in a variable, a macro's argument or a block, and is never written.
    (
        "{% set ns = namespace(s='abc') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "a text of more than 64 MiB",
    ),
    (
        "{% set ns = namespace(s='abc') %}{% for a in range(60) %}{% set ns.s = (ns.s) + ns.s %}{% endfor %}",
        "a text of more than 64 MiB",
    ),
    (
        "{% set ns = namespace(s='abc') %}{% for a in range(60) %}{% set ns.s = ns.s * 2 + 'a' %}{% endfor %}",
        "repeated string is too large",
    ),
    (
        "{% set ns = namespace(s='abc') %}{% for a in range(60) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
        "more than 256 MiB of text and lists",
    ),
    (
        "{% set ns = namespace(s='abc') %}{% for a in range(60) %}{% set ns.s = ''.join([ns.s, ns.s]) %}{% endfor %}",
        "a text of more than 64 MiB",
    ),
    (
        "{% set ns = namespace(s='abc') %}{% for a in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
        "more than 256 MiB of text and lists",
    ),
    (
        "{% macro f(s, n) %}{% if n %}{{ f(s ~ s ~ s ~ s, n - 1) }}{% endif %}{% endmacro %}{{ f('abcdefgh' * 4000, 20) }}",
        "a text of more than 64 MiB",
    ),
    (
        "{% set ns = namespace(s='x' * 30000000, l=[]) %}{% for a in range(90000) %}{% set ns.l = ns.l + [ns.s[a:]] %}{% endfor %}",
        "more than 256 MiB of text and lists",
    ),
    (
        "{% set ns = namespace(s='x' * 30000000, l=[]) %}{% for a in range(90000) %}{% set ns.l = ns.l + [ns.s | upper] %}{% endfor %}",
        "more than 256 MiB of text and lists",
    ),
    (
        "{% set ns = namespace(l=[1]) %}{% for a in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l | length }}",
        "more than 256 MiB of text and lists",
    ),
    (
        "{% set l = ['x' * 30000000] * 9000 %}{% set s = l | join %}",
        "a text of more than 64 MiB",
    ),
    (
        "{% set s = ('x' * 30000000) | list %}",
        "a list of a text of more than 16 MiB",
    ),
    ("{{ '%999999999d' | format(1) }}", "format takes no width"),
    ("{{ '{:>999999999}'.format(1) }}", "format takes no width"),
    ("{{ [1] | batch(999999999999) }}", "batch"),
    ("{% include '/etc/passwd' %}", "template"),
    ("{% import 'os' as os %}{{ os.system('true') }}", "template"),
    (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "undefined",
    ),
    ("{{ messages.append(1) }}", "append"),
    ("{{ cycler.__init__.__globals__ }}", "undefined"),
    (
        "{{ raise_exception('Roles must alternate') }}",
        "line 1: Roles must alternate",
    ),
    ("{{ strftime_now('%') }}", "cannot use the format"),
    ("{{ undefined_function() }}", "undefined_function"),
];

/// Whatever a stranger's template does, it ends soon and in one reason.
#[test]
fn hostile_templates() {
    let conversation = talk(&two_turns());
    for &(source, expected) in HOSTILE {
        let begin = Instant::now();
        let error = template(source)
            .render(&conversation, false)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("the chat template fails: "), "{error}");
        assert!(error.contains(expected), "{source}: {error}");
        // Seconds of a processor at most, on a machine that may be busy.
        assert!(begin.elapsed() < Duration::from_secs(20), "{source}");
    }
    // Values inside one another, deeper than a usual stack could print, compare or drop them.
    let nested = "{% set ns = namespace(x=[], y=[]) %}{% for a in range(300) %}{% for b in range(300) %}{% set ns.x = [ns.x] %}{% set ns.y = {'k': ns.y} %}{% endfor %}{% endfor %}";
    for use_ in [
        "{{ ns.x }}",
        "{{ ns.y }}",
        "{{ ns.x ~ '' }}",
        "{{ ns.y ~ '' }}",
        "{{ ns.x | tojson }}",
        "{{ ns.x == [ns.x] }}",
        "{{ ns.y | tojson(indent=1) | length }}",
        "{{ {ns.x: 1} }}",
        "{% for a in range(90000) %}{% for b in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}",
    ] {
        // A text or an error, and the process lives on.
        let _ = template(&format!("{nested}{use_}")).render(&conversation, false);
    }
    let nested = format!("{{{{ {}1{} }}}}", "(".repeat(10_001), ")".repeat(10_001));
    let chain = format!("{{{{ 1{} }}}}", " + 1".repeat(50_000));
    let long = "x".repeat((1 << 20) + 1);
    for source in [
        nested.as_str(),
        chain.as_str(),
        long.as_str(),
        "{% for %}",
        "{{ 'a",
        "{% if x %}",
    ] {
        let error = ChatTemplate::new(source, None, Map::new())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("the chat template cannot be read: "),
            "{error}"
        );
    }
}
