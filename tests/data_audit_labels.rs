//! The audit of labels: faults planted among them are found.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]

mod audit_support;

use audit_support::{Data, find, labelled, shown};
use ferrotune::data::audit::Severity;
use serde_json::{Value, json};

#[test]
fn labels_that_are_rare_missing_or_spelled_twice() {
    let mut records = labelled(300);
    for place in [20, 22] {
        records[place]["label"] = json!("air");
    }
    for place in [30, 32, 34] {
        records[place]["label"] = json!("Sea ");
    }
    records[50].as_object_mut().unwrap().remove("label");
    let report = Data::new().audit(&records, json!({}));
    assert_eq!(find(&report, "unlabelled").count, 1);
    assert_eq!(find(&report, "unlabelled").examples[0].record, 51);
    assert_eq!(shown(&report, "rare_labels").0, 5);
    assert!(find(&report, "rare_labels").message.contains("`air` (2)"));
    let variants = find(&report, "label_variants");
    assert_eq!((variants.count, variants.examples[0].record), (3, 31));
    assert!(
        variants.message.contains("\"sea\" (144) and \"Sea \" (3)"),
        "{}",
        variants.message
    );
    // 75 times as many as `air`.
    assert_eq!(find(&report, "label_balance").severity, Severity::Warning);
}

#[test]
fn one_class_stops_where_labels_were_asked_for() {
    let records: Vec<Value> = labelled(60).into_iter().step_by(2).collect();
    let data = Data::new();
    let finding = |changes| find(&data.audit(&records, changes), "label_balance").clone();
    assert_eq!(
        finding(json!({"label_column": "label"})).severity,
        Severity::Stop
    );
    assert_eq!(finding(json!({})).severity, Severity::Warning);
    assert!(
        finding(json!({}))
            .message
            .contains("Every record has the label `sea`")
    );
}

#[test]
fn one_text_under_several_labels() {
    let mut records = labelled(200);
    records[100] = records[10].clone();
    records[100]["label"] = json!("land");
    let shouted = records[21]["text"].as_str().unwrap().to_uppercase();
    records[120] = json!({"text": shouted.replace(' ', "  "), "label": "sea"});
    // The same text under the same label is none.
    records[140] = records[40].clone();
    let report = Data::new().audit(&records, json!({}));
    assert_eq!(shown(&report, "conflicting_labels"), (4, vec![11, 22]));
    assert_eq!(
        find(&report, "conflicting_labels").examples[0].note,
        "land | sea"
    );
}

#[test]
fn labels_that_predictions_contradict() {
    let mut records = labelled(400);
    let flipped: Vec<usize> = (0..20).map(|number| number * 19 + 3).collect();
    for &place in &flipped {
        let other = if records[place]["label"] == "sea" {
            "land"
        } else {
            "sea"
        };
        records[place]["label"] = json!(other);
    }
    let report = Data::new().audit(&records, json!({}));
    let finding = find(&report, "doubted_labels");
    let found: Vec<usize> = finding.details["records"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["record"].as_u64().unwrap() as usize - 1)
        .collect();
    let right = flipped.iter().filter(|place| found.contains(place)).count();
    assert!(right >= 16, "{right} of 20 found: {found:?}");
    assert!(found.len() <= right + 2, "{found:?}");
    assert!(finding.details["accuracy"].as_f64().unwrap() > 0.9);
    let again = Data::new().audit(&records, json!({}));
    assert_eq!(
        find(&again, "doubted_labels").details["accuracy"],
        finding.details["accuracy"]
    );
    let without = Data::new().audit(&records, json!({"predict_labels": false}));
    assert!(
        without
            .findings
            .iter()
            .all(|finding| finding.check != "doubted_labels")
    );
}
