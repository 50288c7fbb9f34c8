//! Bad data files, each with its message.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]

mod data_support;

use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, StringArray};
use data_support::{columns, error, read, texts, write, write_parquet};
use ferrotune::data::{Columns, MAX_RECORD_BYTES, open};
use ferrotune::error::Error;
use proptest::prelude::*;
use tempfile::tempdir;

fn auto() -> Columns {
    Columns::default()
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
            .ends_with("a.docx: unknown kind of data file; known are .txt, .jsonl, .csv, .tsv, .parquet, .arrow, also with .gz or .zst behind"),
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
        let expected = "no column `text` or `messages` or `prompt` or `completion`; the columns are: `body`, `title`; name yours with text_column, with messages_column, or with prompt_column and completion_column";
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
    // A column that is not read does no harm, unless it is kept.
    let whole = Columns {
        whole: true,
        ..auto()
    };
    let message = error(&path, &whole);
    assert!(
        message.contains("in column `other` of the row at line 2"),
        "{message}"
    );
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
