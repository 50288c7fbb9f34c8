//! Documents laid into rows of equal length.
//!
//! A document of tokens t₀ … tₙ is read as the inputs t₀ … tₙ₋₁ with the targets t₁ … tₙ: its last token (`eos`, where
//! there is one) is predicted and never read, and neither is anything after its last trained token. For models that shift
//! the targets themselves ([`Layout::Whole`]) that token stands in the row all the same.

use std::collections::BTreeMap;
use std::ops::Range;

use super::batch::{Batch, IGNORE};
use super::example::Example;
use super::random::{Purpose, generator, permutation};
use crate::error::{Error, Result};

/// The inputs `start..start + length` of one example, read as a document of its own.
#[derive(Debug, Clone, Copy)]
struct Piece {
    example: u32,
    start: u32,
    length: u32,
}

impl Piece {
    fn new(example: usize, inputs: &Range<usize>) -> Self {
        Self {
            example: example as u32,
            start: inputs.start as u32,
            length: inputs.len() as u32,
        }
    }

    fn inputs(self) -> Range<usize> {
        self.start as usize..(self.start + self.length) as usize
    }

    fn targets(self) -> Range<usize> {
        let inputs = self.inputs();
        inputs.start + 1..inputs.end + 1
    }
}

/// Rows of at most `sequence_length` positions; the tokens are held once, a row is made when it is asked for.
#[derive(Debug, Clone)]
pub struct Packed {
    examples: Vec<Example>,
    pieces: Vec<Piece>,
    /// Row `i` is `pieces[rows[i]..rows[i + 1]]`.
    rows: Vec<usize>,
    sequence_length: usize,
    layout: Layout,
}

/// Which tokens of a document stand in its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Those that are read; the targets are shifted against them ([`Packed::batch`]).
    Inputs,
    /// Those that are predicted, too ([`Packed::row_tokens_and_labels`]).
    Whole,
}

impl Layout {
    /// Positions that a piece takes beyond its inputs.
    fn extra(self) -> usize {
        usize::from(self == Self::Whole)
    }
}

/// Packed rows, and what became of the documents that did not fit.
#[derive(Debug, Clone)]
pub struct Packing {
    pub packed: Packed,
    /// Documents that lost tokens to the end of a row.
    pub truncated: usize,
    /// Documents that continue in further pieces.
    pub split: usize,
    /// Indices of the examples left out because no trained token of theirs is left.
    pub untrained: Vec<usize>,
}

impl Packing {
    /// Lays `examples` into rows, and the rows into an order drawn from `seed`, so that the first rows are a fair sample.
    ///
    /// With `packing`, rows hold several documents. One that fits into a row stays whole; a longer one is cut into pieces
    /// of `sequence_length`, each of which restarts at position 0 and attends to itself alone, and no trained token is
    /// lost. A document that begins with a masked prompt is cut from its end, so that its completion keeps the
    /// prompt's nearest part; pieces without a trained token are left out. Without `packing`, a row holds one document,
    /// cut after `sequence_length` inputs.
    ///
    /// # Errors
    /// [`Error::Argument`] for a `sequence_length` of 0.
    pub fn new(
        examples: Vec<Example>,
        sequence_length: usize,
        packing: bool,
        seed: u64,
    ) -> Result<Self> {
        Self::with_layout(examples, sequence_length, packing, seed, Layout::Inputs)
    }

    /// As [`Packing::new`]; with [`Layout::Whole`] the token behind the last input stands in the row, too, and no piece
    /// is longer than `sequence_length` with it.
    ///
    /// # Errors
    /// [`Error::Argument`] for a `sequence_length` that holds no input.
    pub fn with_layout(
        examples: Vec<Example>,
        row_length: usize,
        packing: bool,
        seed: u64,
        layout: Layout,
    ) -> Result<Self> {
        let extra = layout.extra();
        if row_length <= extra {
            return Err(Error::argument(format!(
                "sequence_length must be at least {} token{}",
                1 + extra,
                if extra == 0 { "" } else { "s" }
            )));
        }
        let sequence_length = row_length - extra;
        let (mut truncated, mut split) = (0, 0);
        let mut untrained = Vec::new();
        let mut pieces = Vec::new();
        for (index, example) in examples.iter().enumerate() {
            let before = pieces.len();
            let inputs = trained_inputs(example, 0..example.ids().len().saturating_sub(1));
            let cuts = cut(example, &inputs, sequence_length, packing);
            let kept = cuts
                .into_iter()
                .map(|cut| trained_inputs(example, cut))
                .filter(|cut| !cut.is_empty());
            pieces.extend(kept.map(|cut| Piece::new(index, &cut)));
            let count = pieces.len() - before;
            if count == 0 {
                untrained.push(index);
            }
            split += usize::from(count > 1);
            let starts_late = pieces[before..]
                .first()
                .is_some_and(|piece| piece.start > 0);
            let lost = count > 0 && inputs.len() > sequence_length && (!packing || starts_late);
            truncated += usize::from(lost);
        }

        let row_of = if packing {
            best_fit(&pieces, row_length, extra)
        } else {
            (0..pieces.len()).collect()
        };
        let packed = Packed::ordered(examples, &pieces, &row_of, row_length, seed, layout);
        Ok(Self {
            packed,
            truncated,
            split,
            untrained,
        })
    }
}

impl Packed {
    /// Gathers the pieces of each row, rows permuted.
    fn ordered(
        examples: Vec<Example>,
        pieces: &[Piece],
        row_of: &[usize],
        sequence_length: usize,
        seed: u64,
        layout: Layout,
    ) -> Self {
        let count = row_of.iter().max().map_or(0, |last| last + 1);
        let place = permutation(count, &mut generator(seed, Purpose::Rows, 0));
        let mut placed: Vec<(u32, Piece)> = row_of
            .iter()
            .zip(pieces)
            .map(|(&row, &piece)| (place[row], piece))
            .collect();
        placed.sort_by_key(|(row, piece)| (*row, piece.example, piece.start));
        let mut rows = vec![0; count + 1];
        for (row, _) in &placed {
            rows[*row as usize + 1] += 1;
        }
        for row in 0..count {
            rows[row + 1] += rows[row];
        }
        Self {
            examples,
            pieces: placed.into_iter().map(|(_, piece)| piece).collect(),
            rows,
            sequence_length,
            layout,
        }
    }

    /// The example that each row begins with, its only one without packing.
    pub fn examples_of_rows(&self) -> Vec<usize> {
        let rows = self.rows[..self.rows()].iter();
        rows.map(|&first| self.pieces[first].example as usize)
            .collect()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows.len() - 1
    }

    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// Number of positions that hold a token, padding not counted.
    pub fn tokens(&self) -> usize {
        let pieces = self.pieces.iter();
        pieces.map(|piece| self.length(*piece)).sum()
    }

    /// Number of positions that a piece takes.
    fn length(&self, piece: Piece) -> usize {
        piece.length as usize + self.layout.extra()
    }

    /// Number of trained tokens.
    pub fn targets(&self) -> usize {
        let count = |piece: &Piece| {
            let example = &self.examples[piece.example as usize];
            let trained = example.trained_in(piece.targets());
            trained.map(|range| range.len()).sum::<usize>()
        };
        self.pieces.iter().map(count).sum()
    }

    /// Number of positions of every row that hold a token.
    pub fn lengths(&self) -> Vec<u32> {
        (0..self.rows())
            .map(|row| self.row_tokens(row) as u32)
            .collect()
    }

    /// Number of positions of one row that hold a token.
    pub fn row_tokens(&self, row: usize) -> usize {
        self.row(row).iter().map(|piece| self.length(*piece)).sum()
    }

    /// The tokens of one row of [`Layout::Whole`], each with its label (the token itself where it is trained, or else
    /// [`IGNORE`]) and its position; position 0 begins a document, and is never trained.
    pub fn row_tokens_and_labels(&self, row: usize) -> impl Iterator<Item = (u32, i32, u32)> {
        self.row(row).iter().flat_map(move |&piece| {
            let example = &self.examples[piece.example as usize];
            let start = piece.start as usize;
            let mut tokens: Vec<(u32, i32, u32)> = example.ids()[start..start + self.length(piece)]
                .iter()
                .zip(0..)
                .map(|(&id, position)| (id, IGNORE, position))
                .collect();
            for token in example.trained_in(piece.targets()).flatten() {
                tokens[token - start].1 = example.ids()[token] as i32;
            }
            tokens
        })
    }

    fn row(&self, row: usize) -> &[Piece] {
        &self.pieces[self.rows[row]..self.rows[row + 1]]
    }

    /// The batch of these rows, as wide as the longest of them.
    ///
    /// A shorter row is padded with token 0 at position 0 and target [`IGNORE`]: each padding position is a document of
    /// its own, which attends to itself, is attended to by none and is not trained.
    pub fn batch(&self, rows: &[u32]) -> Batch {
        let width = |row: &u32| self.row_tokens(*row as usize);
        let columns = rows.iter().map(width).max().unwrap_or(0);
        let size = rows.len() * columns;
        let mut batch = Batch {
            rows: rows.len(),
            columns,
            ids: vec![0; size],
            targets: vec![IGNORE; size],
            positions: vec![0; size],
        };
        for (line, &row) in rows.iter().enumerate() {
            let mut at = line * columns;
            for piece in self.row(row as usize) {
                let example = &self.examples[piece.example as usize];
                let (inputs, length) = (piece.inputs(), piece.length as usize);
                batch.ids[at..at + length].copy_from_slice(&example.ids()[inputs.clone()]);
                for (position, value) in batch.positions[at..at + length].iter_mut().enumerate() {
                    *value = position as u32;
                }
                for token in example.trained_in(piece.targets()).flatten() {
                    batch.targets[at + token - 1 - inputs.start] = example.ids()[token] as i32;
                }
                at += length;
            }
        }
        batch
    }
}

/// `inputs` without those after the last that has a trained target.
fn trained_inputs(example: &Example, inputs: Range<usize>) -> Range<usize> {
    let targets = inputs.start + 1..inputs.end + 1;
    let end = example.trained_in(targets).next_back();
    inputs.start..end.map_or(inputs.start, |range| range.end - 1)
}

/// Cuts a document's inputs into pieces of at most `length`, in order.
fn cut(
    example: &Example,
    inputs: &Range<usize>,
    length: usize,
    packing: bool,
) -> Vec<Range<usize>> {
    if !packing {
        let end = inputs.end.min(inputs.start + length);
        return std::iter::once(inputs.start..end).collect();
    }
    let masked_start = example
        .trained()
        .first()
        .is_some_and(|range| range.start > 1);
    // Where the first piece ends: short when cut from the end.
    let first = match inputs.len() % length {
        rest if masked_start && rest > 0 => inputs.start + rest,
        _ => inputs.start,
    };
    let head = (first > inputs.start).then_some(inputs.start..first);
    let tail = (first..inputs.end)
        .step_by(length)
        .map(|start| start..inputs.end.min(start + length));
    head.into_iter().chain(tail).collect()
}

/// The row of each piece: longest pieces first, each into the fullest row that has room (best-fit decreasing).
fn best_fit(pieces: &[Piece], length: usize, extra: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_by_key(|&piece| std::cmp::Reverse(pieces[piece].length));
    let mut row_of = vec![0; pieces.len()];
    // Rows by the room left in them; a full row is not listed.
    let mut rooms: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut rows = 0;
    for piece in order {
        let size = pieces[piece].length as usize + extra;
        let fit = rooms.range(size..).next().map(|(room, _)| *room);
        let (row, room) = match fit {
            Some(room) => (take(&mut rooms, room), room),
            None => (None, length),
        };
        let row = row.unwrap_or_else(|| {
            rows += 1;
            rows - 1
        });
        row_of[piece] = row;
        if room > size {
            rooms.entry(room - size).or_default().push(row);
        }
    }
    row_of
}

/// Takes one row out of those with this much room.
fn take(rooms: &mut BTreeMap<usize, Vec<usize>>, room: usize) -> Option<usize> {
    let rows = rooms.get_mut(&room)?;
    let row = rows.pop();
    if rows.is_empty() {
        rooms.remove(&room);
    }
    row
}
