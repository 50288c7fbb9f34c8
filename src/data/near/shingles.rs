//! A text as the set of its character 5-grams.

/// Characters of a shingle.
const LENGTH: usize = 5;
/// An odd multiplier of the rolling polynomial hash (a prime near 2³²/φ).
const BASE: u32 = 0x9e37_79b1;

/// Hashes of the text's character 5-grams, ascending and without repeats.
///
/// Letters are taken in lower case; everything that is neither letter nor digit counts as one space, and none at the
/// ends. A shorter text is one shingle; one without letters and digits has none.
pub fn shingles(text: &str) -> Vec<u32> {
    let mut characters: Vec<u32> = Vec::with_capacity(text.len());
    let mut gap = false;
    for character in text.chars() {
        if !character.is_alphanumeric() {
            gap = true;
            continue;
        }
        if std::mem::take(&mut gap) && !characters.is_empty() {
            characters.push(u32::from(' '));
        }
        if character.is_ascii() {
            characters.push(u32::from(character.to_ascii_lowercase()));
        } else {
            characters.extend(character.to_lowercase().map(u32::from));
        }
    }
    if characters.is_empty() {
        return Vec::new();
    }
    let length = characters.len().min(LENGTH);
    let mut hashes: Vec<u32> = characters.windows(length).map(hash).collect();
    hashes.sort_unstable();
    hashes.dedup();
    hashes
}

fn hash(window: &[u32]) -> u32 {
    let mut hash = window.iter().fold(0u32, |hash, &character| {
        hash.wrapping_add(character)
            .wrapping_mul(BASE)
            .rotate_left(13)
    });
    // MurmurHash3's finaliser.
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// Size of the intersection over size of the union of two ascending sets; 0 for two empty ones.
pub fn jaccard(first: &[u32], second: &[u32]) -> f64 {
    let (mut left, mut right, mut common) = (0, 0, 0usize);
    while let (Some(a), Some(b)) = (first.get(left), second.get(right)) {
        left += usize::from(a <= b);
        right += usize::from(b <= a);
        common += usize::from(a == b);
    }
    let union = first.len() + second.len() - common;
    if union == 0 {
        return 0.0;
    }
    common as f64 / union as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_and_punctuation_play_no_part() {
        let texts = [
            "The cat, the mat.",
            "the   CAT the mat",
            " the cat – the mat! ",
        ];
        let sets = texts.map(shingles);
        assert_eq!(sets[0], sets[1]);
        assert_eq!(sets[0], sets[2]);
        assert_eq!(sets[0].len(), "the cat the mat".len() - 4);
        assert_eq!(shingles("ab").len(), 1);
        assert!(shingles(" .!").is_empty());
        assert_eq!(shingles("ÄÖÜ ß"), shingles("äöü, ß"));
    }

    #[test]
    fn similarity_of_sets() {
        assert_eq!(jaccard(&[1, 2, 3], &[2, 3, 4]), 0.5);
        assert_eq!(jaccard(&[1], &[1]), 1.0);
        assert_eq!(jaccard(&[], &[]), 0.0);
        assert_eq!(jaccard(&[1, 5], &[2]), 0.0);
    }
}
