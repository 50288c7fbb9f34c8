//! Files and tokenizers made on the spot.
#![allow(dead_code)] // each test binary uses its own part

use std::fs::File;
use std::path::{Path, PathBuf};

use arrow_array::{ArrayRef, RecordBatch};
use ferrotune::data::{Columns, Content, Files, Item, Record, Skip, Tokenizer};
use ferrotune::error::Result;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

pub const BOS: u32 = 0;
pub const EOS: u32 = 1;

pub fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

/// A parquet file of these columns, in row groups of 700.
pub fn write_parquet(folder: &Path, name: &str, arrays: Vec<(&str, ArrayRef)>) -> PathBuf {
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

/// Records and skips of some files.
pub fn read(paths: &[PathBuf], columns: &Columns) -> Result<(Vec<Record>, Vec<Skip>)> {
    let (mut records, mut skips) = (Vec::new(), Vec::new());
    for item in Files::open(paths, columns)? {
        match item? {
            Item::Record(record) => records.push(record),
            Item::Skip(skip) => skips.push(skip),
        }
    }
    Ok((records, skips))
}

/// The texts of a file of texts.
pub fn texts(path: &Path, columns: &Columns) -> Vec<String> {
    let (records, skips) = read(&[path.to_owned()], columns).unwrap();
    assert_eq!(skips, []);
    let text = |record: Record| match record.content {
        Content::Text(text) => text,
        content => panic!("not a text: {content:?}"),
    };
    records.into_iter().map(text).collect()
}

/// The message of the one error a file gives.
pub fn error(path: &Path, columns: &Columns) -> String {
    read(&[path.to_owned()], columns).unwrap_err().to_string()
}

pub fn columns(text: Option<&str>, pair: Option<(&str, &str)>, group: Option<&str>) -> Columns {
    Columns {
        text_column: text.map(str::to_owned),
        prompt_column: pair.map(|(prompt, _)| prompt.to_owned()),
        completion_column: pair.map(|(_, completion)| completion.to_owned()),
        messages_column: None,
        label_column: None,
        group_column: group.map(str::to_owned),
        bias_column: None,
        whole: false,
    }
}

/// A byte-level BPE with `merges` merges learned from `corpus`, saved as `folder/tokenizer.json`: the ids are those
/// of `<bos>` and `<eos>`, of the 256 bytes, and of the merges.
pub fn byte_level(folder: &Path, corpus: &str, merges: usize) {
    let special = |text: &str| tokenizers::AddedToken::from(text, true);
    let trainer = BpeTrainer::builder()
        .vocab_size(258 + merges)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![special("<bos>"), special("<eos>")])
        .show_progress(false)
        .min_frequency(1)
        .build();
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)))
        .with_decoder(Some(ByteLevel::default()));
    let mut trainer = TrainerWrapper::BpeTrainer(trainer);
    tokenizer.train(&mut trainer, corpus.lines()).unwrap();
    tokenizer
        .save(folder.join("tokenizer.json"), false)
        .unwrap();
}

/// A tokenizer whose tokens are bytes, without special tokens unless given.
pub fn bytes(folder: &Path, bos: Option<u32>, eos: Option<u32>) -> Tokenizer {
    byte_level(folder, "", 0);
    Tokenizer::from_folder(folder, bos, eos, Some(258)).unwrap()
}

pub fn text(content: &str) -> Record {
    Record {
        content: Content::Text(content.to_owned()),
        label: None,
        group: None,
        bias: None,
        row: None,
        file: 0,
        number: 1,
    }
}
