//! What one process builds once for all its queries.

use std::collections::HashMap;
use std::sync::Arc;

use datafusion_execution::TaskContext;
use datafusion_execution::config::SessionConfig;
use datafusion_execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion_execution::memory_pool::{GreedyMemoryPool, MemoryPool};
use datafusion_execution::runtime_env::RuntimeEnvBuilder;
use object_store::memory::InMemory;

use crate::error::EngineError;
use crate::parquet_file::placeholder_url;

/// Rows in a batch, unless rows are so wide that fewer must do.
pub const BATCH_ROWS: usize = 8192;

/// Threads, memory and settings shared by the queries of a process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineContext {
    pub(crate) threads: usize,
    pub(crate) batch_rows: usize,
    pub(crate) task: Arc<TaskContext>,
}

impl EngineContext {
    /// `threads` partitions per query, `memory_bytes` for all queries together. Nothing spills: a scan has no
    /// operator that could, and beyond the limit a query ends with [`EngineError::OutOfMemory`].
    pub fn new(threads: usize, memory_bytes: usize) -> Result<Self, EngineError> {
        Self::with_pool(
            threads,
            BATCH_ROWS,
            Arc::new(GreedyMemoryPool::new(memory_bytes)),
        )
    }

    /// With a pool of the caller, for instance one that several engines share.
    pub fn with_pool(
        threads: usize,
        batch_rows: usize,
        memory: Arc<dyn MemoryPool>,
    ) -> Result<Self, EngineError> {
        let (threads, batch_rows) = (threads.max(1), batch_rows.max(1));
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(memory)
            .with_disk_manager_builder(
                DiskManagerBuilder::default().with_mode(DiskManagerMode::Disabled),
            )
            .build_arc()?;
        // Files carry their own store; DataFusion only insists that the scan's address resolves to one.
        runtime.register_object_store(placeholder_url().as_ref(), Arc::new(InMemory::new()));
        let config = SessionConfig::new()
            .with_target_partitions(threads)
            .with_batch_size(batch_rows);
        // No functions are registered: plans are physical and name none.
        let task = TaskContext::new(
            None,
            "rakam".to_owned(),
            config,
            HashMap::new(),
            HashMap::new(),
            HashMap::new(),
            HashMap::new(),
            runtime,
        );
        Ok(Self {
            threads,
            batch_rows,
            task: Arc::new(task),
        })
    }

    /// Bytes the running queries hold of the pool.
    pub fn memory_used(&self) -> usize {
        self.task.memory_pool().reserved()
    }
}
