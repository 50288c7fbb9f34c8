//! Labels that a model trained on the other records contradicts.
//!
//! Every record's label is predicted by a model of its words that has not seen the record, nor another one of its text
//! (five-fold cross-validation). Following confident learning (Northcutt, Jiang and Chuang 2021), a label is doubted
//! where the record is as likely to be of another class as the records of that class are on average.

mod features;
mod model;

use std::collections::{BTreeMap, HashMap};

use rayon::prelude::*;
use serde_json::{Value, json};

use self::features::{Features, features};
use self::model::Model;
use super::conflicts::key;
use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};
use crate::data::random::{Purpose, generator, permutation};

const FOLDS: u64 = 5;
/// Records of a label from which it is predicted.
const LEAST: usize = 10;
/// Labels up to which predictions are made: weights of all of them are held for each place.
const MOST_LABELS: usize = 512;
/// Weights of a model: places times labels.
const WEIGHTS: usize = 1 << 23;
const MOST_PLACES: u32 = 1 << 18;
/// Most records that are looked at, evenly among all.
const SAMPLE: usize = 200_000;
/// Confusions that the details list.
const LISTED: usize = 20;

/// A record, its label and what is more likely, by index into the labels.
struct Doubt {
    record: usize,
    label: usize,
    predicted: usize,
    /// Probability of the predicted label minus that of the given one.
    margin: f32,
}

/// `None` where there are no two labels to tell apart.
pub fn check(corpus: &Corpus, counts: &[(&str, usize)]) -> Option<Finding> {
    let labels: Vec<&str> = counts
        .iter()
        .filter(|(_, count)| *count >= LEAST)
        .map(|(label, _)| *label)
        .collect();
    if labels.len() < 2 {
        return None;
    }
    if labels.len() > MOST_LABELS {
        let message = format!(
            "Not looked at: {} labels are more than the {MOST_LABELS} that are predicted.",
            labels.len()
        );
        return Some(Finding::new("doubted_labels", Severity::Ok, 0, 0).message(message));
    }
    let class: HashMap<&str, usize> = labels.iter().copied().zip(0..).collect();
    let all: Vec<(usize, usize)> = corpus
        .labelled()
        .filter_map(|(record, label)| Some((record, *class.get(label)?)))
        .collect();
    let step = all.len().div_ceil(SAMPLE).max(1);
    let examples: Vec<(usize, usize)> = all.into_iter().step_by(step).collect();
    let predicted = predict(corpus, &examples, labels.len());
    Some(report(corpus, &labels, &examples, &predicted, step))
}

/// The probabilities of every class for each example, from a model that has not seen its text.
fn predict(corpus: &Corpus, examples: &[(usize, usize)], classes: usize) -> Vec<Vec<f32>> {
    let texts: Vec<&str> = examples
        .iter()
        .map(|(record, _)| &*corpus.texts[*record])
        .collect();
    let places = ((WEIGHTS / classes) as u32).min(MOST_PLACES);
    let places = 1 << places.ilog2();
    let features: Vec<Features> = features(&texts, places);
    let folds: Vec<u64> = texts
        .par_iter()
        .map(|text| {
            let key = key(text);
            key.iter()
                .fold(0u64, |all, byte| (all << 8) | u64::from(*byte))
                % FOLDS
        })
        .collect();
    let of_fold: Vec<Vec<(usize, Vec<f32>)>> = (0..FOLDS)
        .into_par_iter()
        .map(|fold| {
            let (held, seen): (Vec<usize>, Vec<usize>) =
                (0..examples.len()).partition(|&index| folds[index] == fold);
            let seen: Vec<(&Features, usize)> = seen
                .into_iter()
                .map(|index| (&features[index], examples[index].1))
                .collect();
            let order = |epoch: usize| {
                let number = fold * 1000 + epoch as u64;
                permutation(seen.len(), &mut generator(0, Purpose::Folds, number))
            };
            let model = Model::train(&seen, places, classes, order);
            held.into_iter()
                .map(|index| {
                    let mut probabilities = vec![0.0; classes];
                    model.predict(&features[index], &mut probabilities);
                    (index, probabilities)
                })
                .collect()
        })
        .collect();
    let mut predicted = vec![Vec::new(); examples.len()];
    for (index, probabilities) in of_fold.into_iter().flatten() {
        predicted[index] = probabilities;
    }
    predicted
}

/// The examples whose label is doubted, the least likely labels first.
fn doubts(examples: &[(usize, usize)], predicted: &[Vec<f32>], classes: usize) -> Vec<Doubt> {
    // Mean probability of each class among the examples that have it.
    let mut sums = vec![(0.0f64, 0usize); classes];
    for ((_, label), probabilities) in examples.iter().zip(predicted) {
        sums[*label].0 += f64::from(probabilities[*label]);
        sums[*label].1 += 1;
    }
    let usual: Vec<f32> = sums
        .iter()
        .map(|(sum, count)| (sum / (*count).max(1) as f64) as f32)
        .collect();
    let mut doubts: Vec<Doubt> = examples
        .iter()
        .zip(predicted)
        .filter_map(|(&(record, label), probabilities)| {
            let likely = (0..classes).filter(|&class| probabilities[class] >= usual[class]);
            let likeliest = likely
                .max_by(|&first, &second| probabilities[first].total_cmp(&probabilities[second]))?;
            let margin = probabilities[likeliest] - probabilities[label];
            (likeliest != label && margin > 0.0).then_some(Doubt {
                record,
                label,
                predicted: likeliest,
                margin,
            })
        })
        .collect();
    doubts.sort_by(|first, second| {
        let by_margin = second.margin.total_cmp(&first.margin);
        by_margin.then(first.record.cmp(&second.record))
    });
    doubts
}

fn report(
    corpus: &Corpus,
    labels: &[&str],
    examples: &[(usize, usize)],
    predicted: &[Vec<f32>],
    step: usize,
) -> Finding {
    let doubts = doubts(examples, predicted, labels.len());
    let right = examples
        .iter()
        .zip(predicted)
        .filter(|((_, label), probabilities)| {
            let most = (0..labels.len())
                .max_by(|&first, &second| probabilities[first].total_cmp(&probabilities[second]));
            most == Some(*label)
        });
    let accuracy = right.count() as f64 / examples.len() as f64;
    let mut confusions: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    for doubt in &doubts {
        *confusions
            .entry((doubt.label, doubt.predicted))
            .or_default() += 1;
    }
    let mut confusions: Vec<_> = confusions.into_iter().collect();
    confusions.sort_by_key(|(labels, count)| (std::cmp::Reverse(*count), *labels));
    let listed: Vec<Value> = confusions
        .iter()
        .take(LISTED)
        .map(|((label, predicted), count)| {
            json!({"label": labels[*label], "predicted": labels[*predicted], "records": count})
        })
        .collect();
    let records: Vec<Value> = doubts
        .iter()
        .map(|doubt| {
            let example = corpus.example(doubt.record, "");
            json!({
                "file": example.file, "record": example.record,
                "label": labels[doubt.label], "predicted": labels[doubt.predicted],
            })
        })
        .collect();
    let sample = match step {
        1 => String::new(),
        _ => format!(" (of every {step}th record)"),
    };
    let message = match doubts.len() {
        0 => "Predictions from the other records contradict no label.".to_owned(),
        count => format!(
            "{} of the labels are contradicted by predictions from the other records{sample}, which are right in {:.0} %: read them, the likeliest errors first.",
            share(count, examples.len()),
            accuracy * 100.0
        ),
    };
    let shown = doubts
        .iter()
        .take(corpus.shown)
        .map(|doubt| {
            let note = format!(
                "{}, predicted {}",
                labels[doubt.label], labels[doubt.predicted]
            );
            corpus.example(doubt.record, note)
        })
        .collect();
    Finding::new(
        "doubted_labels",
        Severity::Warning,
        doubts.len(),
        examples.len(),
    )
    .message(message)
    .detail("accuracy", accuracy)
    .detail("folds", FOLDS)
    .detail("confusions", listed)
    .detail("records", records)
    .examples(shown)
}
