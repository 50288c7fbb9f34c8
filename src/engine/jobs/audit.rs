//! An audit of data, with a model's tokenizer where one is named.

use std::path::PathBuf;

use serde::Deserialize;

use super::{tokenizer, with_threads};
use crate::data::Tokenizer;
use crate::data::audit::{AuditConfig, AuditReport, audit as audit_data};
use crate::engine::models::Architecture;
use crate::error::Result;

#[derive(Debug, Clone, Deserialize)]
pub struct AuditJob {
    #[serde(flatten)]
    pub audit: AuditConfig,
    /// Folder of the tokenizer.
    pub model: Option<PathBuf>,
    pub threads: Option<usize>,
}

/// # Errors
/// As [`audit_data`]'s, and those of the tokenizer.
pub fn audit(job: &AuditJob) -> Result<AuditReport> {
    with_threads(job.threads, || {
        let tokenizer = job.model.as_ref().map(|folder| {
            // The tokenizer alone is needed: the model may be one that the engine cannot train.
            Architecture::read(folder).map_or_else(
                |_| Tokenizer::from_folder(folder, None, None, None),
                |config| tokenizer(folder, &config),
            )
        });
        audit_data(&job.audit, tokenizer.transpose()?.as_ref())
    })
}
