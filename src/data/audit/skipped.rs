//! Records that no reader could use.

use super::finding::{Example, Finding, Severity, share};
use crate::data::prepare::Skips;

pub fn check(skips: &Skips, records: usize, shown: usize) -> Finding {
    let all = records + skips.total;
    let examples = skips.first.iter().take(shown).map(|skipped| Example {
        file: skipped.file.clone(),
        record: skipped.record,
        text: String::new(),
        note: skipped.reason.clone(),
    });
    let mut reasons: Vec<(&String, &usize)> = skips.reasons.iter().collect();
    reasons.sort_by(|first, second| second.1.cmp(first.1).then(first.0.cmp(second.0)));
    let mut listed: Vec<String> = reasons
        .iter()
        .take(3)
        .map(|(reason, count)| format!("{reason} ({count})"))
        .collect();
    if reasons.len() > 3 {
        listed.push(format!("{} more reasons", reasons.len() - 3));
    }
    let severity = Severity::by_share(skips.total, all);
    let mut finding = Finding::new("unusable", severity, skips.total, all)
        .message(match skips.total {
            0 => "Every record can be read.".to_owned(),
            total => format!(
                "{} of the records are left out: {}.",
                share(total, all),
                listed.join("; ")
            ),
        })
        .examples(examples.collect());
    for (reason, count) in reasons {
        finding = finding.detail(reason, *count);
    }
    finding
}
