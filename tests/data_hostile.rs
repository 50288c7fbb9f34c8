//! Files made to do harm: each ends in one error that says where, or in counted skips, in bounded memory.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]
#![allow(clippy::format_collect, clippy::single_range_in_vec_init)]

mod data_support;

use std::io::Write;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{FileWriter, IpcWriteOptions};
use data_support::{error, read, texts, write};
use ferrotune::data::Columns;
use ferrotune::error::Error;
use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;
use tempfile::tempdir;

fn auto() -> Columns {
    Columns::default()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn arrow(rows: usize, packed: Option<CompressionType>) -> Vec<u8> {
    let strings: ArrayRef = Arc::new(StringArray::from_iter_values(
        (0..rows).map(|row| format!("row {}", row % 7)),
    ));
    let batch = RecordBatch::try_from_iter([("text", strings)]).unwrap();
    let options = IpcWriteOptions::default()
        .try_with_compression(packed)
        .unwrap();
    let mut writer =
        FileWriter::try_new_with_options(Vec::new(), &batch.schema(), options).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn packed_files_that_are_cut_off_or_damaged() {
    let folder = tempdir().unwrap();
    let lines: String = (0..5000)
        .map(|row| format!("{{\"text\": \"row {row}\"}}\n"))
        .collect();
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(lines.as_bytes()).unwrap();
    let zstd = encoder.finish().unwrap();
    for (ending, bytes) in [("gz", gzip(lines.as_bytes())), ("zst", zstd)] {
        for name in [
            format!("a.jsonl.{ending}"),
            format!("a.txt.{ending}"),
            format!("a.parquet.{ending}"),
        ] {
            for keep in [3, bytes.len() / 2, bytes.len() - 1] {
                let path = write(folder.path(), &name, &bytes[..keep]);
                let message = error(&path, &auto());
                assert!(
                    message.contains("stream is damaged or cut off"),
                    "{name} {keep}: {message}"
                );
            }
        }
        let mut damaged = bytes.clone();
        let middle = bytes.len() / 2;
        damaged[middle..middle + 20].fill(0xff);
        let path = write(folder.path(), &format!("a.jsonl.{ending}"), damaged);
        assert!(matches!(read(&[path], &auto()), Err(Error::Format { .. })));
        let path = write(folder.path(), &format!("b.csv.{ending}"), "text\nplain\n");
        let message = error(&path, &auto());
        assert!(
            message.contains("stream is damaged or cut off"),
            "{message}"
        );
    }
    let header = gzip(b"text\nx\n\"");
    let path = write(folder.path(), "a.csv.gz", &header[..header.len() - 4]);
    assert!(error(&path, &auto()).contains("the gzip stream is damaged or cut off"));
}

/// A megabyte that unpacks to a gigabyte: no more of it is unpacked than a record may be long.
#[test]
fn a_line_of_a_gigabyte() {
    let folder = tempdir().unwrap();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(b"{\"text\": \"").unwrap();
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..1024 {
        encoder.write_all(&piece).unwrap();
    }
    let bomb = encoder.finish().unwrap();
    for name in ["a.jsonl.gz", "a.txt.gz"] {
        let path = write(folder.path(), name, &bomb);
        let message = error(&path, &auto());
        assert!(
            message.contains("line 1 is longer than 32 MiB"),
            "{message}"
        );
    }
    let path = write(folder.path(), "a.csv.gz", &bomb);
    let message = error(&path, &auto());
    assert!(message.contains("a row is longer than 32 MiB"), "{message}");
}

#[test]
fn a_table_of_a_million_columns() {
    let folder = tempdir().unwrap();
    let names: Vec<String> = (0..1_000_000).map(|column| format!("c{column}")).collect();
    let row = vec!["1"; 1_000_000].join(",");
    let header = names.join(",");
    let path = write(folder.path(), "a.csv", format!("{header}\n{row}\n{row}\n"));
    let message = error(&path, &auto());
    assert!(
        message.contains("`c19`, and 999980 more") && message.len() < 2000,
        "{message}"
    );
    let path = write(
        folder.path(),
        "b.csv",
        format!("{header},text\n{row},a\n{row},b\n"),
    );
    assert_eq!(texts(&path, &auto()), ["a", "b"]);
}

#[test]
fn json_that_is_deep_or_wide() {
    let folder = tempdir().unwrap();
    let deep = format!(
        "{{\"messages\": {}{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let path = write(folder.path(), "deep.jsonl", deep);
    let message = error(&path, &auto());
    assert!(
        message.contains("line 1, column") && message.contains("recursion limit"),
        "{message}"
    );
    let wide = format!("{{\"messages\": [{}{{}}]}}", "{},".repeat(1 << 20));
    let path = write(folder.path(), "wide.jsonl", wide);
    let message = error(&path, &auto());
    assert!(
        message.contains("more than 200000 values in one column"),
        "{message}"
    );
    // The same in a string of a table is a record that is skipped.
    let nested = format!("messages\n\"{}\"\n", "[".repeat(500));
    let (records, skips) = read(&[write(folder.path(), "a.csv", nested)], &auto()).unwrap();
    assert!(records.is_empty());
    assert!(
        skips[0].reason.to_string().contains("recursion limit"),
        "{:?}",
        skips[0]
    );
}

#[test]
fn arrow_files_that_are_cut_off_or_lie() {
    let folder = tempdir().unwrap();
    let whole = arrow(3000, None);
    let fails = |bytes: &[u8], expected: &str| {
        let path = write(folder.path(), "a.arrow", bytes);
        let message = error(&path, &auto());
        assert!(message.contains(expected), "{message}");
    };
    fails(b"ARROW", "not a readable Arrow file");
    fails(b"not an arrow file", "not a readable Arrow file");
    fails(&whole[..8], "it holds no schema");
    fails(&whole[..whole.len() / 2], "cut off in a message");
    // Lengths that are claimed are neither allocated nor waited for.
    let at = whole.windows(4).position(|four| four == [0xff; 4]).unwrap() + 4;
    let mut claims = whole.clone();
    claims[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    fails(&claims, "metadata is larger than this reader takes");
    claims[at..at + 4].copy_from_slice(&(60u32 << 20).to_le_bytes());
    fails(&claims, "cut off in a message");
    // A packed buffer that claims to unpack to an exabyte.
    let packed = arrow(3000, Some(CompressionType::LZ4_FRAME));
    let size = (5 * 3000_u64).to_le_bytes();
    let messages: Vec<String> = packed
        .windows(8)
        .enumerate()
        .filter(|(_, window)| *window == size)
        .map(|(start, _)| {
            let mut lies = packed.clone();
            lies[start..start + 8].copy_from_slice(&(1u64 << 60).to_le_bytes());
            error(&write(folder.path(), "a.arrow", lies), &auto())
        })
        .collect();
    let refused =
        |message: &String| message.contains("an unpacked batch is larger than this reader takes");
    assert!(messages.iter().any(refused), "{messages:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn damaged_packed_and_arrow_files_do_not_panic(
        kind in 0usize..5,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        keep: prop::sample::Index,
        cut: bool,
    ) {
        let folder = tempdir().unwrap();
        let lines = "{\"text\": \"One\", \"label\": 2}\n".repeat(20);
        let (name, mut bytes) = match kind {
            0 => ("a.jsonl.gz", gzip(lines.as_bytes())),
            1 => ("a.jsonl.zst", zstd::encode_all(lines.as_bytes(), 1).unwrap()),
            2 => ("a.arrow", arrow(40, None)),
            3 => ("a.arrow", arrow(40, Some(CompressionType::ZSTD))),
            _ => ("a.tsv", b"id\ttext\n1\t\"a \"\"b\"\"\nc\"\n2\t\xc3\xa9\n".to_vec()),
        };
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        for (index, value) in damage {
            if !bytes.is_empty() {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
        }
        let path = write(folder.path(), name, bytes);
        if let Err(error) = read(&[path], &auto()) {
            prop_assert!(matches!(error, Error::Format { .. }), "{error:?}");
        }
    }
}
