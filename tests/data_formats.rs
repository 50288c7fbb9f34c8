//! Every format, read as it should be, and every bad file with its message.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]

mod data_support;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, DictionaryArray, Int64Array, LargeStringArray, RecordBatch, StringArray,
    StringViewArray,
};
use arrow::datatypes::Int32Type;
use data_support::{columns, error, read, texts, write};
use ferrotune::data::{Columns, Content, MAX_RECORD_BYTES, Reason, expand, open};
use ferrotune::error::Error;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use proptest::prelude::*;
use tempfile::tempdir;

fn auto() -> Columns {
    Columns::default()
}

fn write_parquet(folder: &Path, name: &str, arrays: Vec<(&str, ArrayRef)>) -> std::path::PathBuf {
    let path = folder.join(name);
    let batch = RecordBatch::try_from_iter(arrays).unwrap();
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(700))
        .build();
    let file = File::create(&path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    path
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

#[test]
fn missing_and_unknown_files() {
    let folder = tempdir().unwrap();
    let absent = folder.path().join("absent.txt");
    let failed = read(std::slice::from_ref(&absent), &auto()).unwrap_err();
    assert!(
        matches!(&failed, Error::Io { path, source } if *path == absent && source.kind() == std::io::ErrorKind::NotFound)
    );

    let path = write(folder.path(), "a.docx", "x");
    let message = error(&path, &auto());
    assert!(
        message
            .ends_with("a.docx: unknown kind of data file; known are .txt, .jsonl, .csv, .parquet"),
        "{message}"
    );
    assert!(open(&path, &auto()).is_err());

    std::fs::create_dir(folder.path().join("none")).unwrap();
    let message = error(&folder.path().join("none"), &auto());
    assert!(
        message.contains("the folder holds no data files"),
        "{message}"
    );
    assert!(
        read(&[], &auto())
            .unwrap_err()
            .to_string()
            .contains("names no file")
    );
}

#[test]
fn a_json_line_that_does_not_parse() {
    let folder = tempdir().unwrap();
    let good = "{\"text\": \"x\"}";
    let cases = [
        (
            "{\"text\": \"é\" \"b\": 1}",
            "line 3, column 14: not valid JSON: expected `,` or `}`",
        ),
        (
            "{\"text\": \"x\"",
            "line 3, column 12: not valid JSON: EOF while parsing an object",
        ),
        (
            "{\"text\": \"x\"} {}",
            "line 3, column 15: not valid JSON: trailing characters",
        ),
        (
            "[\"x\"]",
            "not valid JSON: invalid type: sequence, expected one JSON object a line",
        ),
        ("text", "line 3, column 2: not valid JSON: expected ident"),
        (
            "{\"text\": \"a\0\"}",
            "line 3, column 12: not valid JSON: control character",
        ),
    ];
    for (line, expected) in cases {
        let path = write(
            folder.path(),
            "a.jsonl",
            format!("{good}\n{good}\n{line}\n{good}\n"),
        );
        let message = error(&path, &auto());
        assert!(
            message.contains(expected) && message.contains("line 3, column"),
            "{message}"
        );
    }
    // Depth costs nothing: what is not wanted is never built.
    let deep = |close: &str| {
        let nested = "[".repeat(100_000) + &close.repeat(100_000);
        format!("{{\"other\": {nested}, \"text\": \"x\"}}")
    };
    let path = write(folder.path(), "deep.jsonl", deep("]"));
    assert_eq!(texts(&path, &auto()), ["x"]);
    let path = write(folder.path(), "deep.jsonl", deep(""));
    assert!(error(&path, &auto()).contains("line 1, column 100011: not valid JSON"));

    let path = write(folder.path(), "a.jsonl", "{\"text\": 5}");
    assert!(error(&path, &auto()).ends_with("line 1: `text` is a number, not a string"));
    let path = write(folder.path(), "a.jsonl", "{\"text\": [\"a\"]}");
    assert!(error(&path, &auto()).ends_with("line 1: `text` is a list, not a string"));
}

#[test]
fn a_column_that_is_not_there_names_those_that_are() {
    let folder = tempdir().unwrap();
    let strings: ArrayRef = Arc::new(StringArray::from(vec!["x"]));
    let paths = [
        write(
            folder.path(),
            "a.jsonl",
            "{\"body\": \"x\"}\n{\"title\": \"x\"}\n",
        ),
        write(folder.path(), "a.csv", "body,title\nx,y\n"),
        write_parquet(
            folder.path(),
            "a.parquet",
            vec![("body", strings.clone()), ("title", strings.clone())],
        ),
    ];
    for path in &paths {
        let message = error(path, &auto());
        let expected = "no column `text` or `prompt` or `completion`; the columns are: `body`, `title`; name yours with text_column, or with prompt_column and completion_column";
        assert!(message.contains(expected), "{message}");
        let message = error(path, &columns(Some("txt"), None, None));
        assert!(
            message.contains("no column `txt`; the columns are: `body`, `title`"),
            "{message}"
        );
        let message = error(path, &columns(None, Some(("title", "answer")), None));
        assert!(
            message.contains("no column `answer`; the columns are: `body`, `title`"),
            "{message}"
        );
    }
    for path in &paths[1..] {
        let message = error(path, &columns(Some("body"), None, Some("author")));
        assert!(
            message.contains("no column `author`; the columns are: `body`, `title`"),
            "{message}"
        );
    }
    let wide: Vec<String> = (0..30).map(|index| format!("c{index}")).collect();
    let path = write(folder.path(), "wide.csv", format!("{}\n", wide.join(",")));
    assert!(error(&path, &auto()).contains("`c19`, and 10 more"));
}

#[test]
fn columns_that_cannot_be_read() {
    let folder = tempdir().unwrap();
    let path = write(folder.path(), "a.csv", "text,text\nx,y\n");
    assert!(error(&path, &auto()).contains("`text` is there more than once"));
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let path = write_parquet(folder.path(), "a.parquet", vec![("text", numbers)]);
    assert!(error(&path, &auto()).ends_with("column `text` holds Int64, not strings"));
    let path = write(folder.path(), "a.txt", "One.\n\nTwo.");
    assert!(error(&path, &columns(None, None, Some("who"))).contains("a .txt file has no columns"));
    let both = columns(Some("a"), Some(("b", "c")), None);
    assert!(error(&path, &both).contains("text_column cannot be combined"));
}

#[test]
fn broken_csv_and_parquet() {
    let folder = tempdir().unwrap();
    let path = write(folder.path(), "a.csv", "a,text\n1,x\n2,x,y\n");
    let message = error(&path, &auto());
    assert!(
        message.contains("line 3: 3 fields where the header has 2"),
        "{message}"
    );

    let open_quote = format!(
        "text\nx\n\"{}",
        "x\n".repeat(MAX_RECORD_BYTES / 2 + (1 << 17))
    );
    let path = write(folder.path(), "a.csv", open_quote);
    let message = error(&path, &auto());
    assert!(
        message.contains("a row is longer than 32 MiB; is a quote left open?"),
        "{message}"
    );

    let path = write(folder.path(), "a.parquet", "not parquet at all");
    assert!(error(&path, &auto()).contains("not a readable parquet file"));
    let strings: ArrayRef = Arc::new(StringArray::from_iter_values(
        (0..5000).map(|row| format!("row {row}")),
    ));
    let path = write_parquet(folder.path(), "b.parquet", vec![("text", strings)]);
    let whole = std::fs::read(&path).unwrap();
    for keep in [whole.len() / 2, whole.len() - 1, 10] {
        let path = write(folder.path(), "cut.parquet", &whole[..keep]);
        assert!(error(&path, &auto()).contains("not a readable parquet file"));
    }
    let mut damaged = whole.clone();
    damaged[4..2000].fill(0xff);
    let path = write(folder.path(), "damaged.parquet", damaged);
    assert!(matches!(read(&[path], &auto()), Err(Error::Format { .. })));
}

#[test]
fn bytes_that_are_not_utf8() {
    let folder = tempdir().unwrap();
    let path = write(folder.path(), "a.txt", b"One.\n\nCaf\xe9.\n");
    let message = error(&path, &auto());
    assert!(
        message.contains("invalid UTF-8 at byte 9 (line 3); convert the file to UTF-8"),
        "{message}"
    );
    let path = write(
        folder.path(),
        "a.jsonl",
        b"{\"text\": \"x\"}\n{\"text\": \"\xe9\"}",
    );
    assert!(error(&path, &auto()).contains("invalid UTF-8 at byte 24 (line 2)"));
    let path = write(folder.path(), "a.csv", b"text,other\nx,\xff\ny\xe9,z\n");
    let message = error(&path, &auto());
    assert!(message.contains("invalid UTF-8 in column `text` of the row at line 3 (from byte 15), 1 bytes into the value"), "{message}");
    let path = write(folder.path(), "b.txt", b"\xff\xfeO\0n\0e\0\n\0");
    assert!(error(&path, &auto()).contains("the file is UTF-16"));
}

#[test]
fn records_that_are_too_long() {
    let folder = tempdir().unwrap();
    let long = "x".repeat(MAX_RECORD_BYTES + 1);
    for name in ["a.txt", "a.jsonl"] {
        let path = write(folder.path(), name, &long);
        let message = error(&path, &auto());
        assert!(
            message.contains("line 1 is longer than 32 MiB"),
            "{message}"
        );
    }
    let path = write(folder.path(), "a.txt", &long[1..]);
    assert_eq!(texts(&path, &auto())[0].len(), MAX_RECORD_BYTES);
    let lines = "x".repeat(1023) + "\n";
    let path = write(
        folder.path(),
        "b.txt",
        format!("a\n\n{}", lines.repeat((MAX_RECORD_BYTES >> 10) + 2)),
    );
    assert!(error(&path, &auto()).contains("the paragraph that reaches line"));
    let strings: ArrayRef = Arc::new(StringArray::from(vec!["x", &long]));
    let path = write_parquet(folder.path(), "a.parquet", vec![("text", strings)]);
    assert!(error(&path, &auto()).contains("`text` of row 2 is longer than 32 MiB"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever bytes a file is damaged with, reading ends in records, skips or one error, about its format, never in a panic.
    #[test]
    fn damaged_files_do_not_panic(
        kind in 0usize..4,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        keep: prop::sample::Index,
        cut: bool,
    ) {
        let folder = tempdir().unwrap();
        let strings: ArrayRef = Arc::new(StringArray::from_iter_values((0..40).map(|row| format!("row {}", row % 9))));
        let path = match kind {
            0 => write(folder.path(), "a.txt", "One\nmore.\n\nTwo é.\n".repeat(3)),
            1 => write(folder.path(), "a.jsonl", "{\"text\": \"One \\u00e9\", \"n\": [1, {}]}\n".repeat(3)),
            2 => write(folder.path(), "a.csv", "id,text\n1,\"a \"\"b\"\"\nc\"\n2,é\n"),
            _ => write_parquet(folder.path(), "a.parquet", vec![("id", strings.clone()), ("text", strings)]),
        };
        let mut bytes = std::fs::read(&path).unwrap();
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        for (index, value) in damage {
            if !bytes.is_empty() {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
        }
        std::fs::write(&path, bytes).unwrap();
        if let Err(error) = read(&[path], &auto()) {
            prop_assert!(matches!(error, Error::Format { .. }), "{error:?}");
        }
    }
}
