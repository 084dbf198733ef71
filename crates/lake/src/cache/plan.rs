//! Which bytes are fetched by which request.

use std::ops::Range;

use super::BLOCK_BYTES;

/// Longest request: what one connection brings in about the time that it takes to answer.
pub(super) const REQUEST_BYTES_MAX: u64 = 4 << 20;
/// Bytes between two wanted ranges that are rather fetched than left out by a second request.
const GAP_BYTES: u64 = 256 << 10;

/// The requests for these ranges of an object, without blocks.
pub(super) fn requests(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut sorted: Vec<Range<u64>> = ranges.iter().filter(|r| !r.is_empty()).cloned().collect();
    sorted.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(GAP_BYTES) => {
                last.end = last.end.max(range.end);
            }
            _ => merged.push(range),
        }
    }
    merged.into_iter().flat_map(cut).collect()
}

/// A long range as parts of about the same length, none above the maximum.
fn cut(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let parts = (range.end - range.start).div_ceil(REQUEST_BYTES_MAX).max(1);
    let length = (range.end - range.start).div_ceil(parts).max(1);
    (0..parts).map(move |part| {
        let start = range.start + part * length;
        start..(start + length).min(range.end)
    })
}

/// The blocks that the ranges touch, in order, each with the part of it that is wanted (as offsets of the object).
pub(super) fn blocks(ranges: &[Range<u64>]) -> Vec<(u64, Range<u64>)> {
    let mut blocks: Vec<(u64, Range<u64>)> = ranges
        .iter()
        .filter(|range| !range.is_empty())
        .flat_map(|range| {
            (range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)).map(|number| {
                let start = range.start.max(number * BLOCK_BYTES);
                (number, start..range.end.min((number + 1) * BLOCK_BYTES))
            })
        })
        .collect();
    blocks.sort_unstable_by_key(|(number, part)| (*number, part.start));
    blocks.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        if same {
            kept.1.end = kept.1.end.max(next.1.end);
        }
        same
    });
    blocks
}

/// Runs of neighbouring blocks, each one request.
pub(super) fn runs(numbers: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some(run)
                if run.end == number
                    && (run.end - run.start + 1) * BLOCK_BYTES <= REQUEST_BYTES_MAX =>
            {
                run.end += 1;
            }
            _ => runs.push(number..number + 1),
        }
    }
    runs
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // one range is what is meant
mod tests {
    use super::*;

    #[test]
    fn near_ranges_are_one_request_and_long_ones_several() {
        let gap = GAP_BYTES;
        assert_eq!(requests(&[]), []);
        assert_eq!(requests(&[5..5]), []);
        assert_eq!(requests(&[10..20, 0..5]), [0..20]);
        assert_eq!(requests(&[0..5, gap + 5..gap + 6]), [0..gap + 6]);
        assert_eq!(
            requests(&[0..5, gap + 6..gap + 7]),
            [0..5, gap + 6..gap + 7]
        );
        let long = 2 * REQUEST_BYTES_MAX + 2;
        let parts = requests(&[1..1 + long]);
        assert_eq!(parts.len(), 3);
        assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(
            parts
                .iter()
                .all(|part| part.end - part.start <= REQUEST_BYTES_MAX)
        );
        assert_eq!((parts[0].start, parts[2].end), (1, 1 + long));
    }

    #[test]
    fn ranges_touch_blocks() {
        let b = BLOCK_BYTES;
        assert_eq!(blocks(&[]), []);
        assert_eq!(blocks(&[3..3]), []);
        assert_eq!(
            blocks(&[b - 1..b + 1, 0..5, 3 * b..3 * b + 1]),
            [(0, 0..b), (1, b..b + 1), (3, 3 * b..3 * b + 1)]
        );
        assert_eq!(runs(&[0, 1, 3, 4, 5, 6, 7, 9]), [0..2, 3..7, 7..8, 9..10]);
    }
}
