//! The audit: faults planted in clean data are found, by number and by place, and clean data has none.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]

mod audit_support;
mod data_support;

use std::path::PathBuf;

use audit_support::{Data, config, find, labelled, plain, shown, text};
use data_support::{bytes, write};
use ferrotune::data::audit::{AuditMode, AuditReport, Severity, audit};
use ferrotune::data::{Prepared, prepare};
use serde_json::{Value, json};

#[test]
fn clean_data_has_no_finding() {
    let report = Data::new().audit(&labelled(400), json!({}));
    for finding in &report.findings {
        assert_eq!(finding.severity, Severity::Ok, "{finding:?}");
        assert_eq!(finding.count, 0);
        assert!(
            finding.examples.is_empty() && !finding.message.is_empty(),
            "{finding:?}"
        );
    }
    let checks: Vec<&str> = report
        .findings
        .iter()
        .map(|finding| finding.check)
        .collect();
    assert_eq!(
        checks,
        [
            "unusable",
            "exact_duplicates",
            "near_duplicates",
            "lengths",
            "encoding",
            "languages",
            "secrets",
            "label_balance",
            "rare_labels",
            "unlabelled",
            "label_variants",
            "conflicting_labels",
            "doubted_labels",
        ]
    );
    assert_eq!((report.records, report.heldout_records), (400, 0));
    assert_eq!(report.labels.len(), 2);
    assert_eq!(
        report
            .lengths
            .histogram
            .iter()
            .map(|(_, count)| count)
            .sum::<usize>(),
        400
    );
    assert_eq!(report.languages[0].name, "English");
}

#[test]
fn records_that_no_reader_can_use() {
    let mut records = plain(50);
    records[3] = json!({"text": "  "});
    records[7] = json!({"text": null});
    records[11] = json!({"text": "a\0b"});
    records[20] = json!({"text": ""});
    let report = Data::new().audit(&records, json!({}));
    assert_eq!(report.records, 46);
    assert_eq!(shown(&report, "unusable"), (4, vec![4, 8, 12, 21]));
    let finding = find(&report, "unusable");
    assert_eq!(
        (finding.of, finding.details["`text` is empty"].as_u64()),
        (50, Some(2))
    );
    assert!(
        finding.message.contains("`text` is empty (2)"),
        "{}",
        finding.message
    );
}

#[test]
fn exact_and_near_duplicates() {
    let mut records = plain(200);
    for copy in [100, 150] {
        records[copy] = records[10].clone();
    }
    for (copy, of) in [(120, 20), (130, 30), (140, 40)] {
        let near = text(of)
            .replace(" and the ", " and a ")
            .replacen("and a", "and the", 4);
        records[copy] = json!({"text": near});
    }
    let report = Data::new().audit(&records, json!({}));
    assert_eq!(shown(&report, "exact_duplicates"), (2, vec![11]));
    assert_eq!(
        find(&report, "exact_duplicates").examples[0].note,
        "3 times"
    );
    assert_eq!(shown(&report, "near_duplicates"), (3, vec![121, 131, 141]));
    let near = find(&report, "near_duplicates");
    assert!(near.details["recall_at_similarity"].as_f64().unwrap() > 0.999);
    assert!(
        near.examples[0].note.contains("alike with record 21"),
        "{:?}",
        near.examples[0]
    );
    assert_eq!(near.severity, Severity::Warning);
    // Without the check there is no finding of it.
    let without = Data::new().audit(&records, json!({"near_duplicates": 0.0}));
    assert!(
        without
            .findings
            .iter()
            .all(|finding| finding.check != "near_duplicates")
    );
}

#[test]
fn held_out_records_that_are_trained_on() {
    let data = Data::new();
    let records = plain(100);
    let mut heldout: Vec<Value> = (500..520)
        .map(|number| json!({"text": text(number)}))
        .collect();
    heldout[4] = records[50].clone();
    heldout[9] = json!({"text": text(60) + "!"});
    let file = data.file("held.jsonl", &heldout);
    let report = data.audit(&records, json!({"heldout_data": [file]}));
    assert_eq!(shown(&report, "leakage"), (2, vec![5, 10]));
    let finding = find(&report, "leakage");
    assert_eq!(finding.severity, Severity::Warning);
    assert_eq!(
        (
            finding.details["same"].as_u64(),
            finding.details["near"].as_u64()
        ),
        (Some(1), Some(1))
    );
    assert_eq!((report.records, report.heldout_records), (120, 20));
    // The duplicates across the sides are leaks, and none of the training side.
    assert_eq!(find(&report, "near_duplicates").count, 0);

    let copy = data.file("copy.jsonl", &records[30..40]);
    let report = data.audit(&records, json!({"heldout_data": [copy]}));
    assert_eq!(find(&report, "leakage").severity, Severity::Stop);
    assert!(
        find(&report, "leakage")
            .message
            .contains("would measure memory")
    );
}

#[test]
fn broken_encodings() {
    let mut records = plain(100);
    records[5] = json!({"text": text(5) + " Caf\u{c3}\u{a9}"});
    records[6] = json!({"text": text(6) + " \u{fffd}"});
    records[7] = json!({"text": text(7) + " \u{1b}[0m"});
    records[8] = json!({"text": text(8) + " fish &amp; chips"});
    records[9] = json!({"text": text(9) + " – “Größe” is fine"});
    let report = Data::new().audit(&records, json!({}));
    let finding = find(&report, "encoding");
    assert_eq!((finding.count, finding.of), (4, 100));
    let mut places: Vec<usize> = finding
        .examples
        .iter()
        .map(|example| example.record)
        .collect();
    places.sort_unstable();
    assert_eq!(places, [6, 7, 8, 9]);
    assert!(
        finding.message.contains("mojibake) in 1"),
        "{}",
        finding.message
    );
}

#[test]
fn languages_that_are_mixed() {
    let german = "Der Hund läuft über die Straße und sieht dabei die Katze, die unter dem alten Baum vor dem Haus schläft und träumt.";
    let mut records = plain(100);
    for place in [10, 20, 30] {
        records[place] = json!({"text": format!("{german} {place}")});
    }
    let report = Data::new().audit(&records, json!({"near_duplicates": 0.0}));
    let finding = find(&report, "languages");
    assert_eq!(finding.severity, Severity::Warning);
    let german: Vec<usize> = finding
        .examples
        .iter()
        .filter(|example| example.note == "German")
        .map(|example| example.record)
        .collect();
    assert_eq!(german, [11, 21, 31]);
    assert_eq!(finding.details["main"], "English");
    assert!(
        report
            .languages
            .iter()
            .any(|count| count.name == "German" && count.records == 3)
    );
}

#[test]
fn outlying_lengths() {
    let mut records = plain(100);
    records[40] = json!({"text": text(40).repeat(30)});
    records[41] = json!({"text": "Short."});
    let report = Data::new().audit(&records, json!({}));
    assert_eq!(shown(&report, "lengths").0, 2);
    assert_eq!(find(&report, "lengths").details["longer"], 1);
    assert_eq!(report.lengths.shortest, 6);
    assert!(report.lengths.longest > 20 * report.lengths.median);
}

#[test]
fn secrets_are_found_and_not_shown() {
    let mut records = plain(100);
    records[12] = json!({"text": text(12) + " Write to jane.doe@example.org soon."});
    records[13] = json!({"text": text(13) + " AKIAIOSFODNN7EXAMPLE"});
    records[14] = json!({"text": text(14) + " 4111 1111 1111 1111"});
    records[15] = json!({"text": text(15) + " 4111 1111 1111 1112 is no card"});
    let report = Data::new().audit(&records, json!({}));
    let finding = find(&report, "secrets");
    assert_eq!(shown(&report, "secrets"), (3, vec![14, 13, 15]));
    let all = serde_json::to_string(&report).unwrap();
    for secret in [
        "jane.doe@example",
        "AKIAIOSFODNN7EXAMPLE",
        "4111 1111 1111 1111",
    ] {
        assert!(!all.contains(secret), "{secret}");
    }
    assert_eq!(finding.details["AWS access key"], 1);
}

#[test]
fn records_that_are_too_long_or_never_trained() {
    let data = Data::new();
    let tokenizer = bytes(data.folder.path(), None, None);
    let mut records: Vec<Value> = (0..40)
        .map(|number| json!({"prompt": format!("{number}: "), "completion": "Yes, it is."}))
        .collect();
    records[5]["completion"] = json!("Yes".repeat(100));
    records[6]["prompt"] = json!("Why? ".repeat(100));
    let file = data.file("b.jsonl", &records);
    let report = |changes: Value| audit(&config(&file, changes), Some(&tokenizer)).unwrap();
    let packed = report(json!({}));
    assert_eq!(shown(&packed, "untrained").0, 0);
    assert_eq!(shown(&packed, "too_long"), (2, vec![7, 6]));
    assert_eq!(find(&packed, "too_long").severity, Severity::Note);
    let tokens = packed.tokens.clone().unwrap();
    assert!(tokens.trained < tokens.read && tokens.longest > 500);
    // Cut off after 64 tokens, the second one has none that is trained.
    let cut = report(json!({"packing": false}));
    assert_eq!(shown(&cut, "untrained"), (1, vec![7]));
    assert_eq!(shown(&cut, "too_long"), (1, vec![6]));
    assert_eq!(find(&cut, "too_long").severity, Severity::Warning);

    let talks: Vec<Value> = (0..5)
        .map(|number| json!({"messages": [{"role": "user", "content": format!("Q {number}")}]}))
        .collect();
    write(
        data.folder.path(),
        "chat_template.jinja",
        "{{ messages[0].content }}",
    );
    let tokenizer = bytes(data.folder.path(), None, None);
    let file = data.file("c.jsonl", &talks);
    let report = audit(&config(&file, json!({})), Some(&tokenizer)).unwrap();
    assert_eq!(find(&report, "untrained").severity, Severity::Stop);
    assert!(
        find(&report, "untrained")
            .message
            .contains("no turn of an assistant")
    );
}

#[test]
fn the_report_does_not_depend_on_threads() {
    let mut records = labelled(300);
    records[100] = records[10].clone();
    records[200]["label"] = json!("land");
    let data = Data::new();
    let reports: Vec<AuditReport> = [1, 3]
        .into_iter()
        .map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| data.audit(&records, json!({})))
        })
        .map(|report| AuditReport {
            seconds: Vec::new(),
            ..report
        })
        .collect();
    assert_eq!(reports[0], reports[1]);
}

#[test]
fn bad_settings_and_no_records() {
    let data = Data::new();
    let file = data.file("a.jsonl", &plain(3));
    let error = audit(&config(&file, json!({"near_duplicates": 1.5})), None).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("near_duplicates must lie above 0"),
        "{error}"
    );
    let empty = data.file("empty.jsonl", &[json!({"text": ""})]);
    let error = audit(&config(&empty, json!({})), None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no record can be used") && error.contains("`text` is empty"),
        "{error}"
    );
}

#[test]
fn a_run_stops_where_training_would_be_meaningless() {
    let data = Data::new();
    let tokenizer = bytes(data.folder.path(), None, None);
    let mut records = labelled(100);
    records[50] = records[7].clone();
    let file = data.file("a.jsonl", &records);
    let copy = data.file("copy.jsonl", &records[20..30]);
    let one = data.file(
        "one.jsonl",
        &labelled(60).into_iter().step_by(2).collect::<Vec<_>>(),
    );
    let run = |file: &PathBuf, mode: AuditMode, changes: Value| {
        let mut changes = changes;
        changes["heldout"] = json!(0.2);
        let mut data = config(file, changes).data;
        data.audit = mode;
        prepare(&data, &tokenizer)
    };
    let faults = |prepared: &Prepared| -> Vec<&str> {
        prepared
            .report
            .audit
            .iter()
            .map(|finding| finding.check)
            .collect()
    };
    // What is no reason to stop is reported.
    let prepared = run(&file, AuditMode::Stop, json!({})).unwrap();
    assert_eq!(faults(&prepared), ["exact_duplicates"]);
    assert!(faults(&run(&file, AuditMode::Off, json!({})).unwrap()).is_empty());
    for (file, changes, expected) in [
        (
            &file,
            json!({"heldout_data": [copy]}),
            "Every held-out record is in the training data",
        ),
        (
            &one,
            json!({"label_column": "label"}),
            "Every record has the label `sea`",
        ),
    ] {
        let error = run(file, AuditMode::Stop, changes.clone())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("the audit stops this run: ") && error.contains(expected),
            "{error}"
        );
        assert!(error.contains("set audit to warn"), "{error}");
        let prepared = run(file, AuditMode::Warn, changes).unwrap();
        assert_eq!(
            prepared
                .report
                .audit
                .iter()
                .map(|finding| finding.severity)
                .max(),
            Some(Severity::Stop)
        );
    }
    // Without a label column that was asked for, one class is no reason to stop.
    assert!(run(&one, AuditMode::Stop, json!({})).is_ok());
}
