//! Every format, read as it should be.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]

mod data_support;

use std::sync::Arc;

use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, DictionaryArray, Int64Array, LargeStringArray, StringArray, StringViewArray,
};
use data_support::{columns, read, texts, write, write_parquet};
use ferrotune::data::{Columns, Content, Reason, expand};
use tempfile::tempdir;

fn auto() -> Columns {
    Columns::default()
}

#[test]
fn txt_paragraphs() {
    let folder = tempdir().unwrap();
    let path = write(
        folder.path(),
        "a.txt",
        "\u{feff}\n\nOne,\r\nstill one.\r\n \t\r\n\r\nTwo.\n\nThree.",
    );
    assert_eq!(
        texts(&path, &auto()),
        ["One,\nstill one.", "Two.", "Three."]
    );
}

#[test]
fn txt_without_blank_lines_is_lines() {
    let folder = tempdir().unwrap();
    let path = write(folder.path(), "a.TXT", "\nOne.\nTwo.\nThree.\n\n");
    assert_eq!(texts(&path, &auto()), ["One.", "Two.", "Three."]);
}

#[test]
fn jsonl_texts_and_other_keys() {
    let folder = tempdir().unwrap();
    let path = write(
        folder.path(),
        "a.jsonl",
        "{\"text\": \"One \\u00e9\\n\", \"meta\": {\"a\": [1, {\"b\": null}]}}\n\n{\"id\": 2, \"te\\u0078t\": \"Two\"}\r\n",
    );
    assert_eq!(texts(&path, &auto()), ["One é\n", "Two"]);
}

#[test]
fn jsonl_completions_groups_and_numbers() {
    let folder = tempdir().unwrap();
    let path = write(
        folder.path(),
        "a.jsonl",
        "{\"prompt\": \"Q\", \"completion\": \"A\", \"who\": \"x\"}\n{\"prompt\": \"\", \"completion\": \"B\", \"who\": 7}\n",
    );
    let (records, skips) = read(&[path], &columns(None, None, Some("who"))).unwrap();
    assert_eq!(skips, []);
    let pair = |prompt: &str, completion: &str| Content::Completion {
        prompt: prompt.to_owned(),
        completion: completion.to_owned(),
    };
    assert_eq!(records[0].content, pair("Q", "A"));
    assert_eq!(records[1].content, pair("", "B"));
    assert_eq!(records[0].group.as_deref(), Some("x"));
    assert_eq!(records[1].group.as_deref(), Some("7"));
    assert_eq!((records[1].file, records[1].number), (0, 2));
}

#[test]
fn named_columns_may_be_the_group_too() {
    let folder = tempdir().unwrap();
    let path = write(folder.path(), "a.jsonl", "{\"q\": \"Q\", \"a\": \"A\"}\n");
    let (records, _) = read(&[path], &columns(None, Some(("q", "a")), Some("q"))).unwrap();
    assert_eq!(records[0].group.as_deref(), Some("Q"));
}

#[test]
fn csv_by_name_with_quotes_and_breaks() {
    let folder = tempdir().unwrap();
    let path = write(
        folder.path(),
        "a.csv",
        "\u{feff}id, body ,who\r\n1,\"One, \"\"quoted\"\"\nline\",x\r\n2,Two,y\r\n",
    );
    let wanted = columns(Some("body"), None, Some("who"));
    assert_eq!(texts(&path, &wanted), ["One, \"quoted\"\nline", "Two"]);
    let (records, _) = read(std::slice::from_ref(&path), &wanted).unwrap();
    assert_eq!(records[1].group.as_deref(), Some("y"));
    assert_eq!(texts(&path, &columns(Some("id"), None, None)), ["1", "2"]);
}

#[test]
fn parquet_string_types_over_row_groups() {
    let folder = tempdir().unwrap();
    let rows = 3000;
    let values: Vec<String> = (0..rows).map(|row| format!("text {row}")).collect();
    let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows));
    let dictionary: DictionaryArray<Int32Type> = values.iter().map(String::as_str).collect();
    let arrays: [ArrayRef; 4] = [
        Arc::new(StringArray::from(values.clone())),
        Arc::new(LargeStringArray::from(values.clone())),
        Arc::new(StringViewArray::from_iter_values(&values)),
        Arc::new(dictionary),
    ];
    for (index, array) in arrays.into_iter().enumerate() {
        let path = write_parquet(
            folder.path(),
            &format!("{index}.parquet"),
            vec![
                ("id", numbers.clone()),
                ("text", array),
                ("n", numbers.clone()),
            ],
        );
        let (records, skips) = read(&[path], &columns(None, None, Some("id"))).unwrap();
        assert_eq!(skips, []);
        assert_eq!(records.len(), rows as usize);
        for (row, record) in records.iter().enumerate() {
            assert_eq!(record.content, Content::Text(values[row].clone()));
            assert_eq!(record.group, Some(row.to_string()));
            assert_eq!(record.number, row + 1);
        }
    }
}

#[test]
fn parquet_columns_in_any_order() {
    let folder = tempdir().unwrap();
    let strings = |value: &str| -> ArrayRef { Arc::new(StringArray::from(vec![value])) };
    let arrays = vec![
        ("who", strings("w")),
        ("completion", strings("c")),
        ("x", strings("x")),
        ("prompt", strings("p")),
    ];
    let path = write_parquet(folder.path(), "a.parquet", arrays);
    let (records, _) = read(&[path], &columns(None, None, Some("who"))).unwrap();
    let pair = Content::Completion {
        prompt: "p".to_owned(),
        completion: "c".to_owned(),
    };
    assert_eq!(records[0].content, pair);
    assert_eq!(records[0].group.as_deref(), Some("w"));
}

#[test]
fn folders_are_read_in_order_of_their_paths() {
    let folder = tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("sub/.hidden")).unwrap();
    write(folder.path(), "sub/b.txt", "From b.");
    write(folder.path(), "sub/.hidden/c.txt", "Hidden.");
    write(folder.path(), "a.jsonl", "{\"text\": \"From a.\"}");
    write(folder.path(), "README.md", "Not data.");
    let last = write(folder.path(), "z.csv", "text\nFrom z.\n");
    let paths = [last.clone(), folder.path().to_owned()];
    let (records, _) = read(&paths, &auto()).unwrap();
    let found: Vec<_> = records
        .iter()
        .map(|record| (&record.content, record.file))
        .collect();
    let text = |text: &str| Content::Text(text.to_owned());
    assert_eq!(
        found,
        [
            (&text("From z."), 0),
            (&text("From a."), 1),
            (&text("From b."), 2),
            (&text("From z."), 3)
        ]
    );
    assert_eq!(expand(&paths).unwrap()[2], folder.path().join("sub/b.txt"));
}

#[test]
fn what_holds_no_text_is_skipped_with_its_reason() {
    let folder = tempdir().unwrap();
    let lines = [
        r#"{"text": "kept", "who": "a"}"#,
        r#"{"text": "", "who": "a"}"#,
        r#"{"text": " \n\t", "who": "a"}"#,
        r#"{"text": null, "who": "a"}"#,
        r#"{"who": "a"}"#,
        r#"{"text": "a\u0000b", "who": "a"}"#,
        r#"{"text": "no group", "who": null}"#,
    ];
    let path = write(folder.path(), "a.jsonl", lines.join("\n"));
    let (records, skips) = read(&[path], &columns(None, None, Some("who"))).unwrap();
    assert_eq!(records.len(), 1);
    let name = |name: &str| name.to_owned();
    let expected = [
        (2, Reason::Empty(name("text"))),
        (3, Reason::Empty(name("text"))),
        (4, Reason::Null(name("text"))),
        (5, Reason::Missing(name("text"))),
        (6, Reason::Nul(name("text"))),
        (7, Reason::Null(name("who"))),
    ];
    let found: Vec<_> = skips
        .into_iter()
        .map(|skip| (skip.number, skip.reason))
        .collect();
    assert_eq!(found, expected);

    let path = write(folder.path(), "b.txt", "One.\n\na\0b\n\nTwo.\n");
    let (records, skips) = read(&[path], &auto()).unwrap();
    assert_eq!((records.len(), skips.len()), (2, 1));
    assert_eq!(
        skips[0].reason.to_string(),
        "`text` contains a NUL byte, which no text has"
    );

    let path = write(
        folder.path(),
        "c.csv",
        "prompt,completion\n,kept\nq,\"  \"\n",
    );
    let (records, skips) = read(&[path], &auto()).unwrap();
    assert_eq!((records.len(), skips[0].number), (1, 2));

    let nulls: ArrayRef = Arc::new(StringArray::from(vec![Some("kept"), None]));
    let path = write_parquet(folder.path(), "d.parquet", vec![("text", nulls)]);
    let (records, skips) = read(&[path], &auto()).unwrap();
    assert_eq!((records.len(), skips[0].number), (1, 2));
    assert_eq!(skips[0].reason, Reason::Null(name("text")));
}

#[test]
fn files_without_records_are_skipped() {
    let folder = tempdir().unwrap();
    let none: ArrayRef = Arc::new(StringArray::from(Vec::<&str>::new()));
    let paths = [
        write(folder.path(), "a.txt", ""),
        write(folder.path(), "b.txt", "\n \n\n"),
        write(folder.path(), "c.jsonl", "\n\n"),
        write(folder.path(), "d.csv", ""),
        write(folder.path(), "e.csv", "text\n"),
        write(folder.path(), "f.csv", "\n\n"),
        write(folder.path(), "g.parquet", ""),
        write_parquet(folder.path(), "h.parquet", vec![("text", none)]),
    ];
    let (records, skips) = read(&paths, &auto()).unwrap();
    assert_eq!(records, []);
    let found: Vec<_> = skips.iter().map(|skip| (skip.file, skip.number)).collect();
    assert_eq!(
        found,
        (0..paths.len()).map(|file| (file, 0)).collect::<Vec<_>>()
    );
    assert!(skips.iter().all(|skip| skip.reason == Reason::EmptyFile));
}
