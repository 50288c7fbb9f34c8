//! One tokenised record.

use std::ops::Range;

/// The tokens of one document, and which of them are trained: predicted from those before them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    ids: Vec<u32>,
    /// Sorted, disjoint, not empty; never contains 0, for nothing comes before the first token.
    trained: Vec<Range<u32>>,
}

impl Example {
    /// `trained` holds ranges of indices into `ids`, sorted and disjoint; what reaches over the ends is cut.
    pub fn new(ids: Vec<u32>, trained: impl IntoIterator<Item = Range<usize>>) -> Self {
        let end = ids.len();
        let trained = trained
            .into_iter()
            .map(|range| range.start.max(1) as u32..range.end.min(end) as u32)
            .filter(|range| !range.is_empty())
            .collect();
        Self { ids, trained }
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The trained tokens, as ranges of indices into [`Example::ids`].
    pub fn trained(&self) -> &[Range<u32>] {
        &self.trained
    }

    /// Number of trained tokens.
    pub fn target_count(&self) -> usize {
        self.trained.iter().map(ExactSizeIterator::len).sum()
    }

    /// The trained tokens among `range`, as ranges of indices.
    pub(super) fn trained_in(
        &self,
        range: Range<usize>,
    ) -> impl DoubleEndedIterator<Item = Range<usize>> {
        self.trained
            .iter()
            .map(move |trained| {
                range.start.max(trained.start as usize)..range.end.min(trained.end as usize)
            })
            .filter(|common| !common.is_empty())
    }
}
