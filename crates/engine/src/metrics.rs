//! What a scan did, for EXPLAIN.

use std::sync::atomic::{AtomicU64, Ordering};

use datafusion_physical_plan::metrics::{MetricValue, MetricsSet};

/// Counters of one scan. Files skipped before the scan are the caller's to tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScanMetrics {
    /// Data files whose footer was looked at.
    pub files_opened: u64,
    /// Files that are not ours, skipped by the names of their folders.
    pub files_skipped: u64,
    /// Bytes asked from the stores, footers out of the manifest not counted.
    pub bytes_read: u64,
    pub row_groups_read: u64,
    pub row_groups_pruned_by_stats: u64,
    pub row_groups_pruned_by_bloom: u64,
    /// Data pages skipped by the page index.
    pub pages_pruned: u64,
    pub chunks_read: u64,
    /// Rows of the un-digested inbox tail, before the filter.
    pub tail_rows: u64,
    pub rows_out: u64,
}

impl ScanMetrics {
    pub(crate) fn add(&mut self, other: &Self) {
        self.files_opened += other.files_opened;
        self.files_skipped += other.files_skipped;
        self.bytes_read += other.bytes_read;
        self.row_groups_read += other.row_groups_read;
        self.row_groups_pruned_by_stats += other.row_groups_pruned_by_stats;
        self.row_groups_pruned_by_bloom += other.row_groups_pruned_by_bloom;
        self.pages_pruned += other.pages_pruned;
        self.chunks_read += other.chunks_read;
        self.tail_rows += other.tail_rows;
        self.rows_out += other.rows_out;
    }

    /// Adds what DataFusion's Parquet source counted.
    pub(crate) fn add_parquet(&mut self, set: &MetricsSet) {
        for metric in set.iter() {
            let MetricValue::PruningMetrics {
                name,
                pruning_metrics,
            } = metric.value()
            else {
                continue;
            };
            let pruned = pruning_metrics.pruned() as u64;
            match name.as_ref() {
                "row_groups_pruned_statistics" => self.row_groups_pruned_by_stats += pruned,
                "row_groups_pruned_bloom_filter" => {
                    self.row_groups_pruned_by_bloom += pruned;
                    self.row_groups_read += pruning_metrics.matched() as u64;
                }
                "page_index_pages_pruned" => self.pages_pruned += pruned,
                _ => {}
            }
        }
    }
}

/// The counters our own operators keep while they run.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) files_opened: AtomicU64,
    pub(crate) bytes_read: AtomicU64,
    pub(crate) chunks_read: AtomicU64,
    pub(crate) tail_rows: AtomicU64,
}

impl Counters {
    pub(crate) fn snapshot(&self) -> ScanMetrics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ScanMetrics {
            files_opened: get(&self.files_opened),
            bytes_read: get(&self.bytes_read),
            chunks_read: get(&self.chunks_read),
            tail_rows: get(&self.tail_rows),
            ..ScanMetrics::default()
        }
    }
}
