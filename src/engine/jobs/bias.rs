//! What a model says of groups before and after training: predictions by record, and the losses of
//! texts whose terms are swapped.

use serde::Serialize;

use super::judge::read;
use crate::data::{BatchSource, Swap};
use crate::engine::metrics::Predictions;
use crate::engine::{Control, Hooks, Judged, Judging};
use crate::error::{Error, Result};

/// Which records are looked at, and how they fall into groups.
#[derive(Default)]
pub(super) struct BiasPlan<'a> {
    /// `test` or `held-out`.
    pub side: &'static str,
    /// Of each of a classifier's records, in order; none where it names no group, or several.
    pub groups: Vec<Option<String>>,
    /// A classifier's records.
    pub records: Option<&'a dyn BatchSource>,
    /// Those of them that have a term, with their terms swapped.
    pub swapped: Option<&'a dyn BatchSource>,
    /// Places of `swapped` among `records`.
    pub places: Vec<usize>,
    /// A language model's records that have a term.
    pub swaps: &'a [Swap],
    /// Records that have a term and cannot be used.
    pub left_out: usize,
    pub sequence_length: usize,
    /// Names of the two sides of a term list, where one is given.
    pub terms: Option<[String; 2]>,
}

/// A model's word on the records of a [`BiasPlan`].
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Said {
    /// A classifier's class of each record.
    pub predicted: Vec<u32>,
    /// And of each swapped one.
    pub swapped: Vec<u32>,
    /// A language model's mean losses of each pair, original and swapped, nats per token.
    pub losses: Vec<[f64; 2]>,
}

/// What is needed to compare groups; the statistics are the caller's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bias {
    pub side: &'static str,
    pub labels: Vec<String>,
    pub groups: Vec<Option<String>>,
    /// A classifier's records' true classes.
    pub truth: Vec<u32>,
    /// Places of the swapped records among all.
    pub places: Vec<usize>,
    /// Of a language model's pairs: 0 or 1 for the side whose terms alone the original has.
    pub sides: Vec<Option<usize>>,
    pub left_out: usize,
    pub terms: Option<[String; 2]>,
    pub before: Said,
    pub after: Said,
}

impl BiasPlan<'_> {
    /// What the model says now, and a classifier's records' true classes.
    ///
    /// # Errors
    /// `Run` where a loss is not finite; `Interrupted` when a hook says stop.
    pub fn ask(
        &self,
        model: &dyn Judging,
        hooks: &mut (dyn Hooks + Send),
    ) -> Result<(Said, Vec<u32>)> {
        let mut classes = |source: Option<&dyn BatchSource>| match source {
            Some(source) => {
                let found = read(model, source, usize::MAX, hooks)?;
                Ok::<_, Error>(found.predictions.unwrap_or_default())
            }
            None => Ok(Predictions::default()),
        };
        let (all, swapped) = (classes(self.records)?, classes(self.swapped)?);
        let mut losses = Vec::with_capacity(self.swaps.len());
        for swap in self.swaps {
            if hooks.poll()? != Control::Continue {
                return Err(Error::Interrupted);
            }
            losses.push(pair(model, swap, self.sequence_length)?);
        }
        let said = Said {
            predicted: all.predicted,
            swapped: swapped.predicted,
            losses,
        };
        Ok((said, all.truth))
    }

    pub fn found(self, labels: &[String], truth: Vec<u32>, before: Said, after: Said) -> Bias {
        Bias {
            side: self.side,
            labels: labels.to_vec(),
            groups: self.groups,
            truth,
            places: self.places,
            sides: self.swaps.iter().map(|swap| swap.group).collect(),
            left_out: self.left_out,
            terms: self.terms,
            before,
            after,
        }
    }
}

fn pair(model: &dyn Judging, swap: &Swap, sequence_length: usize) -> Result<[f64; 2]> {
    let batch = swap.batch(sequence_length);
    match model.judge(&batch)? {
        Judged::Language { rows, .. } if rows.len() == 2 => {
            Ok([0, 1].map(|row: usize| rows[row].0 / rows[row].1 as f64))
        }
        _ => Err(Error::run("a language model gave no loss for each row")),
    }
}
