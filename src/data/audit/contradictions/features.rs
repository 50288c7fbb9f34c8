//! A text as weighted words and pairs of words, hashed into a fixed number of places.

use rayon::prelude::*;

/// Places and weights of one text, of length 1 by the sum of squares.
pub type Features = Vec<(u32, f32)>;

/// TF-IDF of the words and of the pairs of neighbours: (1 + ln tf) · ln((1 + n) / (1 + df)) over hashed places (Weinberger
/// et al. 2009). `places` is a power of two.
pub fn features(texts: &[&str], places: u32) -> Vec<Features> {
    let counts: Vec<Vec<(u32, u32)>> = texts.par_iter().map(|text| count(text, places)).collect();
    let mut documents = vec![0u32; places as usize];
    for text in &counts {
        for (place, _) in text {
            documents[*place as usize] += 1;
        }
    }
    let weight = |(place, count): (u32, u32)| {
        let rarity = (1 + texts.len()) as f32 / (1 + documents[place as usize]) as f32;
        (place, (1.0 + (count as f32).ln()) * rarity.ln())
    };
    counts
        .into_par_iter()
        .map(|text| {
            let mut weights: Features = text.into_iter().map(weight).collect();
            let norm = weights
                .iter()
                .map(|(_, value)| value * value)
                .sum::<f32>()
                .sqrt();
            if norm > 0.0 {
                for (_, value) in &mut weights {
                    *value /= norm;
                }
            }
            weights
        })
        .collect()
}

/// How often each place occurs, by place.
fn count(text: &str, places: u32) -> Vec<(u32, u32)> {
    let mut hashes: Vec<u32> = Vec::new();
    let mut before = None;
    let words = text.split(|character: char| !character.is_alphanumeric());
    for word in words.filter(|word| !word.is_empty()) {
        let hash = word.chars().flat_map(char::to_lowercase).fold(
            0xcbf2_9ce4_8422_2325,
            // FNV-1a, a character at a time.
            |hash: u64, character| (hash ^ u64::from(character)).wrapping_mul(0x0100_0000_01b3),
        );
        hashes.push(place(hash, places));
        if let Some(before) = before {
            let pair = u64::wrapping_mul(before, 0x9e37_79b9_7f4a_7c15) ^ hash;
            hashes.push(place(pair, places));
        }
        before = Some(hash);
    }
    hashes.sort_unstable();
    hashes
        .chunk_by(|first, second| first == second)
        .map(|same| (same[0], same.len() as u32))
        .collect()
}

fn place(mut hash: u64, places: u32) -> u32 {
    // SplitMix64's finaliser: the low bits of the above are poor.
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (hash ^ (hash >> 31)) as u32 & (places - 1)
}
