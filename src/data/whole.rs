//! A whole data set as one part, to evaluate on.

use std::path::PathBuf;

use super::pack::Packed;
use super::prepare::{DataConfig, Skips, Source};
use super::record::{Content, Record};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// What is evaluated.
#[derive(Debug, Clone)]
pub struct Whole {
    pub packed: Packed,
    /// Every file that was read, folders expanded.
    pub files: Vec<PathBuf>,
    /// UTF-8 bytes of what is predicted, a text or a completion; none where a part of one was cut off, and for
    /// conversations, of which the template decides what is predicted.
    pub bytes: Option<usize>,
    /// Records that were left out.
    pub skipped: usize,
    /// What to tell about them and about those that were cut; none where there is nothing to tell.
    pub warning: Option<String>,
}

/// Every record of `config.data`, in its order.
///
/// # Errors
/// As [`super::prepare`]'s.
pub fn prepare_whole(config: &DataConfig, tokenizer: &Tokenizer) -> Result<Whole> {
    let mut skips = Skips::default();
    let source = Source::read(&config.data, config, &mut skips)?;
    let (packing, records) = source.pack(config, tokenizer, &mut skips)?;
    if packing.packed.targets() == 0 {
        return Err(Error::argument(format!(
            "the data have no token to predict{}",
            skips.example()
        )));
    }
    let bytes = spelled(&records, packing.truncated);
    let truncated = packing.truncated;
    let told = truncated > 0 || skips.total > 0;
    Ok(Whole {
        packed: packing.packed,
        files: source.paths.clone(),
        bytes,
        skipped: skips.total,
        warning: told.then(|| {
            let cut = if truncated > 0 {
                format!(", {truncated} of them cut to sequence_length")
            } else {
                String::new()
            };
            format!("{} records are read{cut}{}", records.len(), skips.example())
        }),
    })
}

/// UTF-8 bytes of what is predicted of `records`; none where a part of one was cut off, and for conversations.
pub(super) fn spelled(records: &[&Record], truncated: usize) -> Option<usize> {
    let bytes = records.iter().map(|record| match &record.content {
        Content::Text(text) => Some(text.len()),
        Content::Completion { completion, .. } => Some(completion.len()),
        Content::Messages { .. } => None,
    });
    bytes.sum::<Option<usize>>().filter(|_| truncated == 0)
}
