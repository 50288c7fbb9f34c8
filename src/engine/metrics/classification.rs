//! Accuracy, macro-F1, Matthews' correlation, calibration, and what they are made of, as
//! scikit-learn defines them where it does (`zero_division=0`).

use serde::{Deserialize, Serialize};

use super::bootstrap::{Interval, intervals};

/// Bins of equal width for the calibration error (Guo et al., 2017).
const BINS: usize = 15;
/// Classes up to which every count of the confusion matrix gets an interval.
const CELLS: usize = 64;

/// What a model said of each text.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Predictions {
    pub truth: Vec<u32>,
    pub predicted: Vec<u32>,
    /// Probability of the predicted class.
    pub confidence: Vec<f32>,
    /// Negative log-likelihood of the true class, nats.
    pub loss: Vec<f64>,
}

impl Predictions {
    /// Takes in `logits` `[rows, classes]` and the rows' true classes.
    pub fn extend(&mut self, logits: &[f32], classes: usize, truth: &[i32]) {
        for (row, &label) in logits.chunks_exact(classes).zip(truth) {
            let Ok(label) = u32::try_from(label) else {
                continue;
            };
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exps = row.iter().map(|&value| f64::from(value - top).exp());
            let total: f64 = exps.sum();
            // The first of equal ones, as numpy's argmax.
            let predicted = row.iter().position(|&value| value == top).unwrap_or(0);
            self.truth.push(label);
            self.predicted.push(predicted as u32);
            self.confidence.push((1.0 / total) as f32);
            self.loss
                .push(total.ln() - f64::from(row[label as usize] - top));
        }
    }

    pub fn len(&self) -> usize {
        self.truth.len()
    }

    pub fn is_empty(&self) -> bool {
        self.truth.is_empty()
    }
}

/// One class, of which there are `support` texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassMetrics {
    pub label: String,
    pub precision: Interval,
    pub recall: Interval,
    pub f1: Interval,
    pub support: usize,
}

/// The measures that are one number each.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ClassificationSummary {
    pub accuracy: Interval,
    /// Unweighted mean of F1 over the classes that occur among the true or the predicted ones.
    pub macro_f1: Interval,
    /// Matthews' correlation coefficient (Gorodkin, 2004, for several classes).
    pub mcc: Interval,
    /// Mean distance of confidence and accuracy over 15 bins of confidence.
    pub calibration_error: Interval,
}

/// A classifier's quality on a set of texts, with 95 % bootstrap intervals over the texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassificationMetrics {
    pub examples: usize,
    /// Mean negative log-likelihood of the true class, nats.
    pub loss: Interval,
    #[serde(flatten)]
    pub summary: ClassificationSummary,
    pub classes: Vec<ClassMetrics>,
    /// Texts by true class (row) and predicted class (column), in the order of `classes`.
    pub confusion: Vec<Vec<usize>>,
    /// Low and high end of each of these counts; none for more than 64 classes.
    pub confusion_interval: Option<Vec<Vec<[f64; 2]>>>,
}

/// # Panics
/// Where there is no prediction.
pub fn classification(
    predictions: &Predictions,
    labels: &[String],
    seed: u64,
) -> ClassificationMetrics {
    let n = labels.len();
    let all = intervals(predictions.len(), seed, |drawn| {
        let confusion = Confusion::of(predictions, drawn, n);
        let mut values = vec![
            drawn
                .iter()
                .map(|&at| predictions.loss[at as usize])
                .sum::<f64>()
                / drawn.len() as f64,
            confusion.accuracy(),
            confusion.macro_f1(),
            confusion.mcc(),
            calibration_error(predictions, drawn),
        ];
        for class in 0..n {
            values.extend(confusion.precision_recall_f1(class));
        }
        if n <= CELLS {
            values.extend(&confusion.counts);
        }
        values
    });
    let (five, rest) = all.split_at(5);
    let (classes, cells) = rest.split_at(3 * n);
    let every: Vec<u32> = (0..predictions.len() as u32).collect();
    let confusion = Confusion::of(predictions, &every, n);
    let counts = predictions.truth.iter();
    let support = |class: usize| counts.clone().filter(|&&t| t as usize == class).count();
    ClassificationMetrics {
        examples: predictions.len(),
        loss: five[0],
        summary: ClassificationSummary {
            accuracy: five[1],
            macro_f1: five[2],
            mcc: five[3],
            calibration_error: five[4],
        },
        classes: labels
            .iter()
            .zip(classes.chunks_exact(3))
            .enumerate()
            .map(|(class, (label, three))| ClassMetrics {
                label: label.clone(),
                precision: three[0],
                recall: three[1],
                f1: three[2],
                support: support(class),
            })
            .collect(),
        confusion: confusion
            .counts
            .chunks_exact(n)
            .map(|row| row.iter().map(|&count| count as usize).collect())
            .collect(),
        confusion_interval: (n <= CELLS).then(|| {
            let rows = cells.chunks_exact(n);
            rows.map(|row| row.iter().map(|cell| [cell.low, cell.high]).collect())
                .collect()
        }),
    }
}

struct Confusion {
    n: usize,
    /// By true class, then predicted class.
    counts: Vec<f64>,
}

impl Confusion {
    fn of(predictions: &Predictions, drawn: &[u32], n: usize) -> Self {
        let mut counts = vec![0.0; n * n];
        for &at in drawn {
            let at = at as usize;
            counts[predictions.truth[at] as usize * n + predictions.predicted[at] as usize] += 1.0;
        }
        Self { n, counts }
    }

    fn right(&self, class: usize) -> f64 {
        self.counts[class * self.n + class]
    }

    fn truths(&self, class: usize) -> f64 {
        self.counts[class * self.n..(class + 1) * self.n]
            .iter()
            .sum()
    }

    fn predictions(&self, class: usize) -> f64 {
        self.counts.iter().skip(class).step_by(self.n).sum()
    }

    fn total(&self) -> f64 {
        self.counts.iter().sum()
    }

    fn accuracy(&self) -> f64 {
        (0..self.n).map(|class| self.right(class)).sum::<f64>() / self.total()
    }

    fn precision_recall_f1(&self, class: usize) -> [f64; 3] {
        let (right, truths) = (self.right(class), self.truths(class));
        let predictions = self.predictions(class);
        [
            part(right, predictions),
            part(right, truths),
            part(2.0 * right, truths + predictions),
        ]
    }

    fn macro_f1(&self) -> f64 {
        let occurs = |&class: &usize| self.truths(class) + self.predictions(class) > 0.0;
        let scores: Vec<f64> = (0..self.n)
            .filter(occurs)
            .map(|class| self.precision_recall_f1(class)[2])
            .collect();
        scores.iter().sum::<f64>() / scores.len() as f64
    }

    fn mcc(&self) -> f64 {
        let (mut right, mut crossed, mut truths, mut predictions) = (0.0, 0.0, 0.0, 0.0);
        for class in 0..self.n {
            let (t, p) = (self.truths(class), self.predictions(class));
            right += self.right(class);
            crossed += t * p;
            truths += t * t;
            predictions += p * p;
        }
        let total = self.total();
        let spread = (total * total - predictions) * (total * total - truths);
        part(right * total - crossed, spread.sqrt())
    }
}

/// 0 where there is nothing to divide by.
fn part(of: f64, whole: f64) -> f64 {
    if whole == 0.0 { 0.0 } else { of / whole }
}

/// Σ |bin| / n · |accuracy(bin) − mean confidence(bin)|, bin i being (i/15, (i+1)/15].
fn calibration_error(predictions: &Predictions, drawn: &[u32]) -> f64 {
    let mut bins = [(0.0f64, 0.0f64); BINS];
    for &at in drawn {
        let at = at as usize;
        let confidence = f64::from(predictions.confidence[at]);
        let bin = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        let is_right = predictions.truth[at] == predictions.predicted[at];
        bins[bin].0 += f64::from(u8::from(is_right));
        bins[bin].1 += confidence;
    }
    let gaps = bins
        .iter()
        .map(|(right, confidence)| (right - confidence).abs());
    gaps.sum::<f64>() / drawn.len() as f64
}
