//! A whole data set as one part, to evaluate on.

use super::pack::Packed;
use super::prepare::{DataConfig, Skips, Source};
use super::record::Content;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Every record of `config.data`, in its order, and the UTF-8 bytes of what is predicted in them: a text, or a
/// completion. Of conversations the template decides which bytes those are: there is no number then.
///
/// # Errors
/// As [`super::prepare`]'s.
pub fn prepare_whole(
    config: &DataConfig,
    tokenizer: &Tokenizer,
) -> Result<(Packed, Option<usize>)> {
    let mut skips = Skips::default();
    let source = Source::read(&config.data, config, &mut skips)?;
    let bytes = source
        .records
        .iter()
        .map(|record| match &record.content {
            Content::Text(text) => Some(text.len()),
            Content::Completion { completion, .. } => Some(completion.len()),
            Content::Messages { .. } => None,
        })
        .sum();
    let (packing, _) = source.pack(config, tokenizer, &mut skips)?;
    if packing.packed.targets() == 0 {
        return Err(Error::argument(format!(
            "the data have no token to predict{}",
            skips.example()
        )));
    }
    Ok((packing.packed, bytes))
}
