//! Texts that are far longer or shorter than the others.

use serde::Serialize;

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};

/// Robust standard deviations of the logarithm from which a length is an outlier.
const FAR: f64 = 4.0;
/// And at least this many times longer or shorter than the median.
const TIMES: f64 = 4.0;
/// Of the histogram, for each doubling.
const BARS_PER_DOUBLING: f64 = 2.0;

/// Lengths in characters.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Lengths {
    pub shortest: usize,
    pub median: usize,
    /// 99 of 100 are at most as long.
    pub percentile_99: usize,
    pub longest: usize,
    /// Bars of the histogram over the logarithm: the least length of each, and how many there are.
    pub histogram: Vec<(usize, usize)>,
}

pub fn check(corpus: &Corpus) -> (Finding, Lengths) {
    let lengths: Vec<usize> = corpus
        .texts
        .iter()
        .map(|text| text.chars().count())
        .collect();
    let mut sorted = lengths.clone();
    sorted.sort_unstable();
    let quantile = |part: f64| sorted[((sorted.len() - 1) as f64 * part).round() as usize];
    let (shortest, longest) = (quantile(0.0), quantile(1.0));
    let median = quantile(0.5).max(1);
    let log = |length: usize| (length.max(1) as f64).ln();
    let mut deviations: Vec<f64> = lengths
        .iter()
        .map(|length| (log(*length) - log(median)).abs())
        .collect();
    deviations.sort_by(f64::total_cmp);
    // Of a normal distribution, 1.4826 median deviations are one standard deviation.
    let scale = 1.4826 * deviations[deviations.len() / 2];
    let limit = (FAR * scale).max(TIMES.ln());
    let far: Vec<usize> = (0..lengths.len())
        .filter(|&index| (log(lengths[index]) - log(median)).abs() > limit)
        .collect();
    let mut shown = far.clone();
    shown.sort_by(|&first, &second| {
        let distance = |index: usize| (log(lengths[index]) - log(median)).abs();
        distance(second)
            .total_cmp(&distance(first))
            .then(first.cmp(&second))
    });
    let examples = shown
        .into_iter()
        .take(corpus.shown)
        .map(|index| corpus.example(index, format!("{} characters", lengths[index])))
        .collect();
    let longer = far.iter().filter(|&&index| lengths[index] > median).count();
    let message = match far.len() {
        0 => format!("Lengths lie about the median of {median} characters."),
        count => format!(
            "{} of the records are far longer ({longer}) or shorter ({}) than the median of {median} characters: often headers, dumps or texts that were not cut apart.",
            share(count, lengths.len()),
            count - longer
        ),
    };
    let finding = Finding::new("lengths", Severity::Note, far.len(), lengths.len())
        .message(message)
        .detail("longer", longer)
        .detail("shorter", far.len() - longer)
        .examples(examples);
    let lengths = Lengths {
        shortest,
        median: quantile(0.5),
        percentile_99: quantile(0.99),
        longest,
        histogram: histogram(&sorted),
    };
    (finding, lengths)
}

fn histogram(sorted: &[usize]) -> Vec<(usize, usize)> {
    let bar = |length: usize| ((length.max(1) as f64).log2() * BARS_PER_DOUBLING) as usize;
    let (Some(first), Some(last)) = (sorted.first(), sorted.last()) else {
        return Vec::new();
    };
    let begin = bar(*first);
    let mut counts = vec![0; bar(*last) - begin + 1];
    for length in sorted {
        counts[bar(*length) - begin] += 1;
    }
    let least = |bar: usize| (bar as f64 / BARS_PER_DOUBLING).exp2().ceil() as usize;
    (begin..).map(least).zip(counts).collect()
}

#[cfg(test)]
mod tests {
    use super::histogram;

    #[test]
    fn bars_hold_every_length_from_their_least_on() {
        let lengths = [1, 1, 2, 3, 4, 5, 100];
        let bars = histogram(&lengths);
        assert_eq!(bars.iter().map(|(_, count)| count).sum::<usize>(), 7);
        for (index, (least, count)) in bars.iter().enumerate() {
            let next = bars.get(index + 1).map_or(usize::MAX, |(least, _)| *least);
            let inside = lengths
                .iter()
                .filter(|length| (*least..next).contains(length));
            assert_eq!(inside.count(), *count, "from {least}");
        }
    }
}
