//! What a model reads in one step.

/// Target value of a position that is not trained.
pub const IGNORE: i32 = -100;

/// Token ids and what each is to predict, row-major `[rows, columns]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub rows: usize,
    pub columns: usize,
    pub ids: Vec<u32>,
    /// Already shifted: `targets[i]` is the token that follows `ids[i]`, or [`IGNORE`].
    pub targets: Vec<i32>,
    /// Position inside the document; 0 starts a new document, which attention never reaches across.
    pub positions: Vec<u32>,
}

impl Batch {
    /// Number of trained positions.
    pub fn target_count(&self) -> usize {
        self.targets
            .iter()
            .filter(|&&target| target != IGNORE)
            .count()
    }
}
