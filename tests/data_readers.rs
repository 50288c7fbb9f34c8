//! Packed files, Arrow files and frames, messages and labels, and reading on many threads.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]
#![allow(clippy::format_collect, clippy::single_range_in_vec_init)]

mod data_support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder, StructBuilder};
use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use arrow_schema::{DataType, Field, Fields};
use data_support::{read, texts, write, write_parquet};
use ferrotune::data::{Columns, Content, Files, Frame, Frames, Item, Reason, Record};
use tempfile::tempdir;

fn auto() -> Columns {
    Columns::default()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd_frame(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn numbered(count: usize) -> RecordBatch {
    let strings: ArrayRef = Arc::new(StringArray::from_iter_values(
        (0..count).map(|row| format!("row {row}")),
    ));
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(0..count as i64));
    RecordBatch::try_from_iter([("id", ids), ("text", strings)]).unwrap()
}

fn expected(count: usize) -> Vec<String> {
    (0..count).map(|row| format!("row {row}")).collect()
}

fn arrow_file(path: &Path, batches: &[RecordBatch], packed: Option<CompressionType>) {
    let options = IpcWriteOptions::default()
        .try_with_compression(packed)
        .unwrap();
    let file = std::fs::File::create(path).unwrap();
    let schema = batches[0].schema();
    let mut writer = FileWriter::try_new_with_options(file, &schema, options).unwrap();
    for batch in batches {
        writer.write(batch).unwrap();
    }
    writer.finish().unwrap();
}

fn arrow_stream(path: &Path, batches: &[RecordBatch]) {
    let file = std::fs::File::create(path).unwrap();
    let mut writer = StreamWriter::try_new(file, &batches[0].schema()).unwrap();
    for batch in batches {
        writer.write(batch).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn every_format_packed_and_unpacked() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let lines: String = expected(3000)
        .iter()
        .map(|text| format!("{text}\n"))
        .collect();
    let json: String = expected(3000)
        .iter()
        .map(|text| format!("{{\"id\": 1, \"text\": \"{text}\"}}\n"))
        .collect();
    let csv: String = expected(3000)
        .iter()
        .map(|text| format!("1,{text}\n"))
        .collect();
    let csv = format!("id,text\n{csv}");
    let parquet = write_parquet(
        folder.path(),
        "a.parquet",
        vec![
            ("id", numbered(3000).column(0).clone()),
            ("text", numbered(3000).column(1).clone()),
        ],
    );
    let batches = [
        numbered(3000).slice(0, 1700),
        numbered(3000).slice(1700, 1300),
    ];
    arrow_file(&path("a.arrow"), &batches, None);
    arrow_file(
        &path("lz4.arrow"),
        &batches,
        Some(CompressionType::LZ4_FRAME),
    );
    arrow_file(&path("zstd.arrow"), &batches, Some(CompressionType::ZSTD));
    arrow_stream(&path("stream.arrow"), &batches);
    let mut plain: Vec<PathBuf> = vec![
        write(folder.path(), "a.txt", &lines),
        write(folder.path(), "a.jsonl", &json),
        write(folder.path(), "a.tsv", csv.replace(',', "\t")),
        write(folder.path(), "a.csv", &csv),
        parquet,
    ];
    plain.extend(["a.arrow", "lz4.arrow", "zstd.arrow", "stream.arrow"].map(path));
    for path in &plain {
        assert_eq!(texts(path, &auto()), expected(3000), "{}", path.display());
        let bytes = std::fs::read(path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let halves = [
            gzip(&bytes[..bytes.len() / 2]),
            gzip(&bytes[bytes.len() / 2..]),
        ]
        .concat();
        for (ending, packed) in [
            ("gz", gzip(&bytes)),
            ("GZ", halves),
            ("zst", zstd_frame(&bytes)),
        ] {
            let packed = write(folder.path(), &format!("{name}.{ending}"), packed);
            assert_eq!(
                texts(&packed, &auto()),
                expected(3000),
                "{}",
                packed.display()
            );
            std::fs::remove_file(packed).unwrap();
        }
    }
    // A folder takes all of them, and nothing else.
    write(folder.path(), "b.jsonl.gz", gzip(json.as_bytes()));
    write(folder.path(), "notes.md.gz", gzip(b"x"));
    let (records, skips) = read(&[folder.path().to_owned()], &auto()).unwrap();
    assert_eq!((records.len(), skips.len()), (3000 * (plain.len() + 1), 0));
}

#[test]
fn labels_beside_a_text() {
    let folder = tempdir().unwrap();
    let lines = "{\"text\": \"a\", \"label\": \"x\"}\n{\"text\": \"b\", \"label\": 3}\n{\"text\": \"c\"}\n{\"text\": \"d\", \"label\": [1]}\n{\"text\": \"e\", \"label\": \" \"}\n";
    let path = write(folder.path(), "a.jsonl", lines);
    let labels = |columns: &Columns| {
        let (records, skips) = read(std::slice::from_ref(&path), columns).unwrap();
        let labels: Vec<Option<String>> = records.into_iter().map(|record| record.label).collect();
        let reasons: Vec<String> = skips.iter().map(|skip| skip.reason.to_string()).collect();
        (labels, reasons)
    };
    let some = |text: &str| Some(text.to_owned());
    let (found, reasons) = labels(&auto());
    assert_eq!(found, [some("x"), some("3"), None, None, None]);
    assert!(reasons.is_empty());
    let named = Columns {
        label_column: some("label"),
        ..auto()
    };
    assert!(
        read(std::slice::from_ref(&path), &named)
            .unwrap_err()
            .to_string()
            .ends_with("line 4: `label` is a list, not a string or a number")
    );
    let csv = write(folder.path(), "a.csv", "text,kind\na,x\nb,\nc,y\n");
    let named = Columns {
        label_column: some("kind"),
        ..auto()
    };
    let (records, skips) = read(&[csv], &named).unwrap();
    let found: Vec<Option<String>> = records.into_iter().map(|record| record.label).collect();
    assert_eq!(found, [some("x"), some("y")]);
    assert_eq!(skips[0].reason.to_string(), "`kind` is empty");
    // Class numbers of a Hugging Face data set; and a column of that name that holds no class.
    let (texts, numbers) = (numbered(2).column(1).clone(), numbered(2).column(0).clone());
    let path = write_parquet(
        folder.path(),
        "a.parquet",
        vec![("label", numbers), ("text", texts)],
    );
    let (records, _) = read(&[path], &auto()).unwrap();
    assert_eq!(records[1].label.as_deref(), Some("1"));
}

/// `[[{role, content, name?}, …], …]` as a Hugging Face data set stores conversations: absent keys are nulls.
fn conversations() -> ArrayRef {
    let strings = [("role", false), ("content", true), ("name", true)];
    let fields: Fields = strings
        .iter()
        .map(|(name, nullable)| Field::new(*name, DataType::Utf8, *nullable))
        .collect();
    let mut list = ListBuilder::new(StructBuilder::from_fields(fields, 4));
    let rows: [&[(&str, &str, Option<&str>)]; 3] = [
        &[
            ("user", "Hi \"you\"", Some("Ann")),
            ("assistant", "Yes?", None),
        ],
        &[],
        &[("assistant", "é", None)],
    ];
    for row in rows {
        for (role, content, name) in row {
            let message = list.values();
            let values = [Some(*role), Some(*content), *name];
            for (index, value) in values.into_iter().enumerate() {
                message
                    .field_builder::<StringBuilder>(index)
                    .unwrap()
                    .append_option(value);
            }
            message.append(true);
        }
        list.append(true);
    }
    Arc::new(list.finish())
}

fn messages(records: &[Record]) -> Vec<(&str, Option<&str>)> {
    records
        .iter()
        .map(|record| match &record.content {
            Content::Messages { messages, tools } => (messages.as_str(), tools.as_deref()),
            other => panic!("no messages: {other:?}"),
        })
        .collect()
}

#[test]
fn messages_in_every_format() {
    let folder = tempdir().unwrap();
    let first = r#"[{"role":"user","content":"Hi \"you\"","name":"Ann"},{"role":"assistant","content":"Yes?"}]"#;
    let last = r#"[{"role":"assistant","content":"é"}]"#;
    let tools = r#"[{"type":"function"}]"#;
    let json = format!(
        "{{\"messages\": {first}, \"tools\": []}}\n{{\"messages\": []}}\n{{\"tools\": {tools}, \"messages\": {last}}}\n"
    );
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let csv = format!(
        "messages,tools\n{},\n[],\n{},{}\n",
        quoted(first),
        quoted(last),
        quoted(tools)
    );
    let schemas: ArrayRef = Arc::new(StringArray::from(vec![None, None, Some(tools)]));
    let batch =
        RecordBatch::try_from_iter([("messages", conversations()), ("tools", schemas)]).unwrap();
    arrow_stream(&folder.path().join("a.arrow"), std::slice::from_ref(&batch));
    let columns = batch.columns();
    let paths = [
        write(folder.path(), "a.jsonl", json),
        write(folder.path(), "a.csv", csv),
        folder.path().join("a.arrow"),
        write_parquet(
            folder.path(),
            "a.parquet",
            vec![
                ("messages", columns[0].clone()),
                ("tools", columns[1].clone()),
            ],
        ),
    ];
    for path in paths {
        let (records, skips) = read(std::slice::from_ref(&path), &auto()).unwrap();
        assert_eq!(
            messages(&records),
            [(first, None), (last, Some(tools))],
            "{}",
            path.display()
        );
        assert_eq!(skips.len(), 1);
        assert_eq!(
            (skips[0].number, &skips[0].reason),
            (2, &Reason::Empty("messages".to_owned()))
        );
    }
}

#[test]
fn messages_that_are_none_are_skipped_with_their_reason() {
    let folder = tempdir().unwrap();
    let cases = [
        (
            "{\"role\": \"user\"}",
            "`messages` is not a list of messages",
        ),
        (
            "\"Hello\"",
            "`messages` is not valid JSON: expected value at line 1 column 1",
        ),
        (
            "[\"Hello\"]",
            "`messages` has a message 1 that is not an object",
        ),
        (
            "[{\"role\": \"user\"}, {\"content\": \"x\"}]",
            "`messages` has a message 2 without a role",
        ),
        (
            "[{\"role\": 1}]",
            "`messages` has a message 1 whose role is not a name",
        ),
        (
            "[{\"role\": \"user\", \"content\": \"a\\u0000\"}]",
            "`messages` contains a NUL byte, which no text has",
        ),
        ("null", "`messages` is null"),
    ];
    let lines: String = cases
        .iter()
        .map(|(json, _)| format!("{{\"messages\": {json}}}\n"))
        .collect();
    let (records, skips) = read(&[write(folder.path(), "a.jsonl", lines)], &auto()).unwrap();
    assert!(records.is_empty());
    let reasons: Vec<String> = skips.iter().map(|skip| skip.reason.to_string()).collect();
    assert_eq!(reasons, cases.map(|(_, reason)| reason));
    let path = write(folder.path(), "b.jsonl", "{\"messages\": 5}");
    assert!(
        data_support::error(&path, &auto()).ends_with("line 1: `messages` is a number, not a list")
    );
}

#[test]
fn frames_stand_among_the_paths() {
    let folder = tempdir().unwrap();
    let batch = numbered(2500);
    let frame = Frame {
        schema: batch.schema(),
        batches: vec![
            batch.slice(0, 100),
            batch.slice(100, 0),
            batch.slice(100, 2400),
        ]
        .into(),
    };
    let name = PathBuf::from("<polars.DataFrame 1>");
    let paths = [write(folder.path(), "a.txt", "One."), name.clone()];
    let frames = Frames::from([(name.clone(), frame)]);
    let items: Vec<Item> = Files::with_frames(&paths, &auto(), &frames)
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    assert_eq!(items.len(), 2501);
    let Item::Record(last) = &items[2500] else {
        panic!("{:?}", items[2500]);
    };
    assert_eq!((last.file, last.number), (1, 2500));
    assert_eq!(last.content, Content::Text("row 2499".to_owned()));
    let error = Files::open(&[name], &auto()).err().unwrap().to_string();
    assert!(error.contains("was a table in memory"), "{error}");
}

/// Blocks are parsed on several threads, and the records come as from one.
#[test]
fn the_order_is_the_same_on_every_thread_count() {
    let folder = tempdir().unwrap();
    let long = "x".repeat(700);
    let big: String = (0..8000)
        .map(|row| match row % 1000 {
            999 => "{\"other\": 1}\n".to_owned(),
            _ => format!("{{\"text\": \"{row} {long}\"}}\n"),
        })
        .collect();
    write(folder.path(), "big.jsonl", big);
    for file in 0..60 {
        write(
            folder.path(),
            &format!("small{file:02}.txt"),
            format!("File {file}.\n\nEnd."),
        );
    }
    write(folder.path(), "small70.txt", "");
    let all = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| read(&[folder.path().to_owned()], &auto()).unwrap())
    };
    let (records, skips) = all(1);
    assert_eq!((records.len(), skips.len()), (8000 - 8 + 120, 8 + 1));
    assert_eq!(records[0].number, 1);
    assert!(
        records
            .windows(2)
            .all(|pair| (pair[0].file, pair[0].number) < (pair[1].file, pair[1].number))
    );
    for threads in [2, 3, 8] {
        assert_eq!(all(threads), (records.clone(), skips.clone()));
    }
}

#[test]
fn a_line_longer_than_a_block_is_one_record() {
    let folder = tempdir().unwrap();
    let long = "y".repeat(3 << 20);
    let path = write(
        folder.path(),
        "a.jsonl",
        format!("{{\"text\": \"a\"}}\n{{\"text\": \"{long}\"}}\n{{\"text\": \"b\"}}"),
    );
    let found = texts(&path, &auto());
    assert_eq!(found.len(), 3);
    assert_eq!((found[1].len(), found[2].as_str()), (3 << 20, "b"));
}
