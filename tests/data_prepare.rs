//! From files to rows: exact masks, the report, and what a bad tokenizer or bad data say.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]
#![allow(clippy::single_range_in_vec_init, clippy::format_collect)]

mod data_support;

use std::path::{Path, PathBuf};

use data_support::{BOS, EOS, byte_level, bytes, text, write};
use ferrotune::data::{
    Batch, Content, DataConfig, Evaluation, Few, Packed, Packing, Prepared, Reason, Tokenizer,
    prepare, prepare_texts,
};
use ferrotune::error::{Error, Result};
use tempfile::tempdir;

fn config(settings: &serde_json::Value) -> DataConfig {
    let mut all = serde_json::json!({
        "model": "unused by the data", "heldout": 0.2, "sequence_length": 32, "packing": true, "seed": 5,
    });
    for (name, value) in settings.as_object().unwrap() {
        all[name] = value.clone();
    }
    serde_json::from_value(all).unwrap()
}

fn completion(prompt: &str, completion: &str) -> Content {
    Content::Completion {
        prompt: prompt.to_owned(),
        completion: completion.to_owned(),
    }
}

fn rows(packed: &Packed) -> Batch {
    packed.batch(&(0..packed.rows() as u32).collect::<Vec<_>>())
}

fn lines(count: usize) -> String {
    (0..count)
        .map(|index| format!("This is line number {index}.\n"))
        .collect()
}

fn message(result: Result<Prepared>) -> String {
    result.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_text_is_trained_from_bos_to_eos() {
    let folder = tempdir().unwrap();
    let content = Content::Text("ab".to_owned());
    let plain = bytes(folder.path(), None, None).example(&content).unwrap();
    let [a, b] = plain.ids()[..] else {
        panic!("{plain:?}")
    };
    assert_eq!(plain.trained(), [1..2]);
    let both = bytes(folder.path(), Some(BOS), Some(EOS))
        .example(&content)
        .unwrap();
    assert_eq!(both.ids(), [BOS, a, b, EOS]);
    assert_eq!(both.trained(), [1..4]);
    let packed = Packing::new(vec![both], 8, true, 0).unwrap().packed;
    let batch = packed.batch(&[0]);
    assert_eq!(batch.ids, [BOS, a, b]);
    assert_eq!(batch.targets, [a as i32, b as i32, EOS as i32]);
}

#[test]
fn a_prompt_is_masked_to_the_token() {
    let folder = tempdir().unwrap();
    // "ab" is one token, so are "abc" (a token that can straddle the boundary) and " x".
    byte_level(folder.path(), "ab ab ab\nabc abc\nq x\nq x", 12);
    let tokenizer = Tokenizer::from_folder(folder.path(), Some(BOS), Some(EOS), None).unwrap();
    let ids = |text: &str| tokenizer.encode(text).unwrap();
    assert_eq!(
        (ids("ab").len(), ids("abc").len(), ids(" x").len()),
        (1, 1, 1)
    );
    for (prompt, answer, joined) in [("q", " x", true), ("ab", "c", false), ("", "ab", true)] {
        let example = tokenizer.example(&completion(prompt, answer)).unwrap();
        let mut expected = tokenizer.encode_prompt(prompt).unwrap();
        let start = expected.len();
        expected.extend(ids(answer));
        expected.push(EOS);
        assert_eq!(example.ids(), expected);
        assert_eq!(example.trained(), [start as u32..expected.len() as u32]);
        assert_eq!(
            ids(&format!("{prompt}{answer}")) == expected[1..expected.len() - 1],
            joined
        );
        assert_eq!(
            tokenizer.decode(example.ids()).unwrap(),
            format!("{prompt}{answer}")
        );
    }
    // Where the joint tokens begin with the prompt's, they are taken: the model sees them in running text too.
    let example = tokenizer.example(&completion("q", " abc")).unwrap();
    assert_eq!(example.ids()[1..example.ids().len() - 1], ids("q abc"));
}

#[test]
fn text_the_tokenizer_cannot_encode_is_skipped() {
    let folder = tempdir().unwrap();
    let json = r#"{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2, "far": 9}, "unk_token": "[UNK]"},
        "pre_tokenizer": {"type": "Whitespace"}, "normalizer": {"type": "Replace", "pattern": {"String": "~"}, "content": ""},
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}, "padding": null,
        "added_tokens": [], "post_processor": null, "decoder": null}"#;
    write(folder.path(), "tokenizer.json", json);
    let tokenizer = Tokenizer::from_folder(folder.path(), None, None, Some(4)).unwrap();
    let example = |text: &str| tokenizer.example(&Content::Text(text.to_owned()));
    // tokenizer.json's own truncation to two tokens is not applied.
    assert_eq!(example("a b a ?").unwrap().ids(), [0, 1, 0, 2]);
    assert_eq!(example("? !"), Err(Reason::UnknownTokens));
    assert_eq!(example("~~"), Err(Reason::NoTokens));
    assert_eq!(
        example("a far"),
        Err(Reason::OutsideVocabulary {
            id: 9,
            vocab_size: 4
        })
    );
    assert_eq!(
        tokenizer.example(&completion("a", "~")),
        Err(Reason::NoTokens)
    );
    assert!(
        tokenizer
            .encode_prompt("far")
            .unwrap_err()
            .to_string()
            .contains("outside the model's vocabulary of 4")
    );

    let data = write(folder.path(), "d.txt", "a b\n? ?\nb a\nfar a\na a\n");
    let prepared = prepare(
        &config(&serde_json::json!({"data": [&data], "heldout": 0.3})),
        &tokenizer,
    )
    .unwrap();
    let report = &prepared.report;
    assert_eq!((report.records, report.skipped_total), (3, 2));
    let mut skipped: Vec<(usize, &str)> = report
        .skipped
        .iter()
        .map(|skip| (skip.record, skip.reason.as_str()))
        .collect();
    skipped.sort_unstable();
    assert_eq!(
        skipped[0],
        (2, "the tokenizer gives only unknown tokens for it")
    );
    assert!(
        skipped[1].0 == 4
            && skipped[1]
                .1
                .contains("token 9, outside the model's vocabulary of 4")
    );
}

#[test]
fn a_tokenizer_that_is_missing_or_broken() {
    let folder = tempdir().unwrap();
    let open = |folder: &Path, bos| {
        Tokenizer::from_folder(folder, bos, None, Some(258))
            .err()
            .expect("an error")
    };
    assert!(
        open(folder.path(), None)
            .to_string()
            .contains("the model folder has no tokenizer.json")
    );
    assert!(matches!(
        open(&folder.path().join("absent"), None),
        Error::Io { .. }
    ));
    write(folder.path(), "tokenizer.json", "{\"model\": ");
    let broken = open(folder.path(), None);
    assert!(matches!(broken, Error::Format { .. }));
    assert!(
        broken
            .to_string()
            .contains("tokenizer.json: not a tokenizer that can be read")
    );
    byte_level(folder.path(), "", 0);
    assert!(
        open(folder.path(), Some(258))
            .to_string()
            .contains("bos_token_id 258 is outside the model's vocabulary of 258")
    );
}

#[test]
fn threads_do_not_change_the_tokens() {
    let folder = tempdir().unwrap();
    byte_level(folder.path(), &lines(50), 100);
    let tokenizer = Tokenizer::from_folder(folder.path(), None, Some(EOS), None).unwrap();
    let records: Vec<_> = (0..200)
        .map(|index| text(&format!("This is line number {index}")))
        .collect();
    let records: Vec<_> = records.iter().collect();
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| tokenizer.examples(&records))
    };
    assert_eq!(on(1), on(2));
}

#[test]
fn the_report_counts_everything() {
    let folder = tempdir().unwrap();
    let tokenizer = bytes(folder.path(), Some(BOS), Some(EOS));
    let data = write(
        folder.path(),
        "d.jsonl",
        (0..10)
            .map(|index| format!("{{\"text\": \"{index}{}\"}}\n", "x".repeat(index * 5)))
            .collect::<String>()
            + &"{\"text\": \"\"}\n".repeat(30),
    );
    let settings =
        |packing: bool| config(&serde_json::json!({"data": [&data], "packing": packing}));
    let prepared = prepare(&settings(true), &tokenizer).unwrap();
    let report = &prepared.report;
    assert_eq!(
        (report.records, report.train_records, report.heldout_records),
        (10, 8, 2)
    );
    // A record of n bytes has n + 1 trained tokens, eos with them, and as many inputs, bos with them.
    let total: usize = (0..10).map(|index| index * 5 + 2).sum();
    assert_eq!(report.train_tokens + report.heldout_tokens, total);
    assert_eq!(report.train_targets + report.heldout_targets, total);
    assert_eq!((report.skipped.len(), report.skipped_total), (20, 30));
    assert_eq!(report.skipped[0].record, 11);
    assert_eq!((report.split, report.truncated), (3, 0));
    assert_eq!(report.train_rows, prepared.train.rows());
    assert_eq!(rows(&prepared.train).target_count(), report.train_targets);
    let json = serde_json::to_value(report).unwrap();
    assert_eq!(json["skipped"][0]["file"], serde_json::json!(&data));
    assert_eq!(json["skipped"][0]["reason"], "`text` is empty");
    assert_eq!(report.files, std::slice::from_ref(&data));

    let report = prepare(&settings(false), &tokenizer).unwrap().report;
    assert_eq!((report.split, report.truncated), (0, 3));
    assert_eq!(
        report.train_targets + report.heldout_targets,
        total - (5 + 10 + 15)
    );
}

#[test]
fn the_fingerprint_is_that_of_the_data() {
    let folder = tempdir().unwrap();
    let tokenizer = bytes(folder.path(), None, None);
    let fingerprint = |name: &str, content: &str, settings: serde_json::Value| {
        let data = write(folder.path(), name, content);
        let mut config = config(&settings);
        config.data = vec![data];
        prepare(&config, &tokenizer).unwrap().report.fingerprint
    };
    let none = || serde_json::json!({"data": []});
    let one = fingerprint("a.txt", &lines(10), none());
    assert_eq!(one.len(), 64);
    assert_eq!(
        one,
        fingerprint(
            "b.txt",
            &lines(10),
            serde_json::json!({"data": [], "seed": 6, "heldout": 0.5})
        )
    );
    assert_ne!(one, fingerprint("a.txt", &lines(11), none()));
    let heldout = write(folder.path(), "h.txt", "Other one.\nOther two.\n");
    assert_ne!(
        one,
        fingerprint(
            "a.txt",
            &lines(10),
            serde_json::json!({"data": [], "heldout_data": [heldout]})
        )
    );
}

#[test]
fn held_out_files_keep_what_is_theirs() {
    let folder = tempdir().unwrap();
    let tokenizer = bytes(folder.path(), None, Some(EOS));
    let rows = |pairs: &[(&str, &str)]| -> String {
        let row = |(text, who): &(&str, &str)| {
            format!("{}\n", serde_json::json!({"text": text, "who": who}))
        };
        pairs.iter().map(row).collect()
    };
    let data = write(
        folder.path(),
        "d.jsonl",
        rows(&[("one", "a"), ("two", "b"), ("three", "c")]),
    );
    let heldout = write(
        folder.path(),
        "h.jsonl",
        rows(&[("two ", "x"), ("four", "c")]),
    );
    let settings = |group: Option<&str>| {
        config(
            &serde_json::json!({"data": [&data], "heldout_data": [&heldout], "heldout": 0.0, "group": group}),
        )
    };
    let report = prepare(&settings(None), &tokenizer).unwrap().report;
    assert_eq!((report.train_records, report.heldout_records), (2, 2));
    assert_eq!(report.files, [data.clone(), heldout.clone()]);
    assert_eq!(
        report.skipped[0].reason,
        "the same text is in the held-out data"
    );
    let report = prepare(&settings(Some("who")), &tokenizer).unwrap().report;
    assert_eq!((report.train_records, report.skipped_total), (1, 2));
    assert_eq!(
        report.skipped[1].reason,
        "its group `c` is in the held-out data"
    );

    let copy = config(&serde_json::json!({"data": [&data], "heldout_data": [&data]}));
    assert!(message(prepare(&copy, &tokenizer)).contains("every record of"));
}

#[test]
fn the_same_seed_gives_the_same_rows() {
    let folder = tempdir().unwrap();
    let tokenizer = bytes(folder.path(), None, Some(EOS));
    let data = write(folder.path(), "d.txt", lines(40));
    let run = |seed: u64| {
        prepare(
            &config(&serde_json::json!({"data": [&data], "seed": seed})),
            &tokenizer,
        )
        .unwrap()
    };
    let (one, same, other) = (run(1), run(1), run(2));
    assert_eq!(rows(&one.train), rows(&same.train));
    assert_eq!(rows(&one.heldout), rows(&same.heldout));
    assert_ne!(rows(&one.heldout), rows(&other.heldout));
    let evaluated: Vec<Batch> = Evaluation::new(&one.heldout, 2, None).unwrap().collect();
    let targets: usize = evaluated.iter().map(Batch::target_count).sum();
    assert_eq!(targets, one.report.heldout_targets);
}

#[test]
fn data_that_cannot_be_trained_on() {
    let folder = tempdir().unwrap();
    let tokenizer = bytes(folder.path(), None, None);
    let failed = |name: &str, content: &str| {
        let data: PathBuf = write(folder.path(), name, content);
        message(prepare(
            &config(&serde_json::json!({"data": [data]})),
            &tokenizer,
        ))
    };
    for (name, content) in [
        ("a.txt", ""),
        ("a.jsonl", ""),
        ("a.csv", ""),
        ("a.parquet", ""),
        ("b.csv", "text\n"),
        ("b.txt", "\n\n"),
    ] {
        let message = failed(name, content);
        assert!(
            message.contains("no record can be used in")
                && message.contains("the file holds no records"),
            "{message}"
        );
        assert!(message.contains(name));
    }
    let message = failed("c.jsonl", "{\"text\": \"\"}\n{\"text\": null}\n");
    assert!(
        message.contains("; 2 skipped, such as") && message.contains("record 2: `text` is null"),
        "{message}"
    );
    for (name, content) in [
        ("d.txt", "One line."),
        ("d.jsonl", "{\"text\": \"x\"}"),
        ("d.csv", "text\nx\n"),
    ] {
        assert!(failed(name, content).contains("there is only one record"));
    }
    // One byte, without bos and eos: nothing precedes it that could predict it.
    let message = failed("e.txt", "a\nb\nc\n");
    assert!(
        message.contains("the training data have no trained token") && message.contains("record "),
        "{message}"
    );
    assert!(failed("f.txt", "x\0y").contains("NUL"));
    let long = |prompt: &str| format!("{{\"prompt\": \"{prompt}\", \"completion\": \"c\"}}\n");
    let data = write(
        folder.path(),
        "g.jsonl",
        long(&"p".repeat(40)) + &long(&"q".repeat(40)),
    );
    let settings = config(&serde_json::json!({"data": [data], "packing": false, "heldout": 0.5}));
    let message = self::message(prepare(&settings, &tokenizer));
    assert!(
        message.contains("no trained token in its first 32 tokens (sequence_length)"),
        "{message}"
    );
}

#[test]
fn few_shots_are_drawn_by_label_and_seed() {
    let folder = tempdir().unwrap();
    let path = folder.path();
    let tokenizer = bytes(path, None, None);
    let line = |at: usize| format!("{{\"text\": \"text {at}\", \"label\": \"{}\"}}\n", at % 3);
    let mut records: Vec<String> = (0..60).map(line).collect();
    records.push(line(0)); // a copy counts once
    let files = [
        write(path, "a.jsonl", records.concat()),
        write(
            path,
            "b.jsonl",
            records.iter().rev().cloned().collect::<String>(),
        ),
    ];
    let drawn = |file: usize, shots: usize, seed: u64| {
        let mut config = config(&serde_json::json!({"data": [files[file]]}));
        config.few = Some(Few { shots, seed });
        prepare_texts(&config, &tokenizer).map(|found| {
            let mut train: Vec<_> = std::iter::zip(found.train.ids, found.train.labels).collect();
            train.sort();
            (train, found.heldout.ids.len(), found.report.train_records)
        })
    };
    let (train, heldout, counted) = drawn(0, 4, 1).unwrap();
    assert_eq!((train.len(), counted), (12, 12));
    for label in ["0", "1", "2"] {
        assert_eq!(train.iter().filter(|(_, name)| name == label).count(), 4);
    }
    let ids: std::collections::HashSet<_> = train.iter().map(|(ids, _)| ids).collect();
    assert_eq!(ids.len(), 12);
    assert_eq!(drawn(1, 4, 1).unwrap().0, train, "the order of the file");
    let other = drawn(0, 4, 2).unwrap();
    assert_ne!(other.0, train);
    assert_eq!(other.1, heldout);
    // More shots of one seed are those of fewer, and others.
    let more = drawn(0, 6, 1).unwrap().0;
    assert!(train.iter().all(|one| more.contains(one)));
    let error = drawn(0, 40, 1).unwrap_err().to_string();
    assert!(error.contains("shots is 40, but there are 1"), "{error}");
    assert!(error.contains("of label '0'"), "{error}");
}

#[test]
fn few_shots_of_texts_without_labels() {
    let folder = tempdir().unwrap();
    let file = write(folder.path(), "a.txt", lines(50));
    let mut config = config(&serde_json::json!({"data": [file]}));
    config.few = Some(Few { shots: 7, seed: 3 });
    let found = prepare(&config, &bytes(folder.path(), None, None)).unwrap();
    assert_eq!(
        (found.report.train_records, found.report.heldout_records),
        (7, 10)
    );
}
