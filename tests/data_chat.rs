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

/// Whatever a stranger's template does, it ends soon and in one reason.
#[test]
fn hostile_templates() {
    let conversation = talk(&two_turns());
    let cases = [
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
    for (source, expected) in cases {
        let begin = Instant::now();
        let error = template(source)
            .render(&conversation, false)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("the chat template fails: "), "{error}");
        assert!(error.contains(expected), "{source}: {error}");
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
    for source in [nested.as_str(), "{% for %}", "{{ 'a", "{% if x %}"] {
        let error = ChatTemplate::new(source, None, Map::new())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("the chat template cannot be read: "),
            "{error}"
        );
    }
}
