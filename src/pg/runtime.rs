//! The engine's threads inside a backend, and the port through which they talk to its own thread.
//!
//! Threads are made lazily (never in the postmaster), with all signals blocked, so that every signal reaches
//! the backend's own thread. They never call the server: they send messages to a [`Port`], which the
//! backend's own thread serves while it waits. A query dropped unfinished retires its runtime: stopping
//! tasks is cooperative, and the next query must not wait for them.

use std::cell::RefCell;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rakam_files::object::WAITING_THREADS;
use tokio::sync::mpsc;

use super::error::{PgError, Result};
use super::wait::{self, Waker};
use super::{exit, guc};

static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);

/// How long the end of an unfinished task is waited for before its threads are taken out of use.
const END_GRACE: Duration = Duration::from_millis(20);

thread_local! {
    static CURRENT: RefCell<Option<Arc<Runtime>>> = const { RefCell::new(None) };
}

/// A set of engine threads. Dropping the last reference stops them without waiting.
pub struct Runtime {
    tokio: Option<tokio::runtime::Runtime>,
    threads: usize,
    /// Tells runtimes of this process apart, for what belongs to one of them, as open connections do.
    number: u64,
}

impl Runtime {
    /// The process' runtime, made now if there is none (or `rakam.threads` has changed).
    pub fn current() -> Result<Arc<Self>> {
        let threads = guc::threads();
        if let Some(runtime) = CURRENT.with_borrow(Clone::clone)
            && runtime.threads == threads
        {
            return Ok(runtime);
        }
        exit::on_exit(shutdown);
        let runtime = Arc::new(Self::start(threads)?);
        CURRENT.set(Some(Arc::clone(&runtime)));
        Ok(runtime)
    }

    fn start(threads: usize) -> Result<Self> {
        let blocked = BlockedSignals::enter();
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            // Those that wait for a network, and those that the network itself waits for: names of hosts, disks.
            .max_blocking_threads(threads + WAITING_THREADS)
            .thread_stack_size(8 << 20)
            .thread_keep_alive(Duration::from_secs(1))
            .thread_name("rakam")
            // Sockets of buckets, and time.
            .enable_all()
            .on_thread_start(block_all_signals)
            .build();
        drop(blocked);
        let tokio = tokio.map_err(|e| {
            PgError::new("53000", format!("could not start engine threads: {e}"))
                .hint("Lower rakam.threads, or raise the limit of processes per user.")
        })?;
        Ok(Self {
            tokio: Some(tokio),
            threads,
            number: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
        })
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    /// Starts a task on the engine's threads.
    pub fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        // A spawn from this thread may start a blocking-pool thread; it inherits this mask.
        let _blocked = BlockedSignals::enter();
        self.tokio
            .as_ref()
            .expect("a runtime keeps its threads until it is dropped")
            .spawn(future)
    }

    /// Takes this runtime out of use: the next query gets new threads, these end when their tasks do.
    pub fn retire(self: &Arc<Self>) {
        CURRENT.with_borrow_mut(|current| {
            if current.as_ref().is_some_and(|c| Arc::ptr_eq(c, self)) {
                *current = None;
            }
        });
    }
}

/// Runs a future on the engine's threads and waits for it; a cancel or termination drops it. For waits of workers on disk
/// and network: outside of transactions, so that nobody waits for a lock of theirs meanwhile.
pub fn wait_for<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Result<T> {
    let (sender, mut port) = port(1)?;
    let _task = Task::spawn(async move {
        let value = future.await;
        sender.send(value).await;
    })?;
    port.receive()
        .ok_or_else(|| PgError::internal("an engine task ended without an answer"))
}

/// A task that somebody waits for, ended when nobody does any more.
pub struct Task {
    runtime: Arc<Runtime>,
    handle: tokio::task::JoinHandle<()>,
}

impl Task {
    pub fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Result<Self> {
        let runtime = Runtime::current()?;
        let handle = runtime.spawn(future);
        Ok(Self { runtime, handle })
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
        let end = Instant::now() + END_GRACE;
        while !self.handle.is_finished() {
            if Instant::now() >= end {
                // Work on files cannot be stopped: whoever comes next gets threads of its own.
                self.runtime.retire();
                return;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if let Some(tokio) = self.tokio.take() {
            tokio.shutdown_background();
        }
    }
}

/// At process exit: no thread may run while `exit()` tears libraries down.
fn shutdown() {
    if let Some(runtime) = CURRENT.take()
        && let Ok(mut runtime) = Arc::try_unwrap(runtime)
        && let Some(tokio) = runtime.tokio.take()
    {
        tokio.shutdown_timeout(Duration::from_secs(1));
    }
}

fn block_all_signals() {
    // SAFETY: changes the signal mask of the calling thread only.
    unsafe {
        let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut());
    }
}

/// All signals blocked on this thread until dropped.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn enter() -> Self {
        // SAFETY: saves and changes the signal mask of the calling thread only; restored in Drop.
        unsafe {
            let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
            let mut old = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigfillset(all.as_mut_ptr());
            libc::sigemptyset(old.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr());
            Self(old.assume_init())
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: restores the mask saved in `enter`.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

/// The backend's end of a channel from engine tasks.
pub struct Port<M> {
    receiver: mpsc::Receiver<M>,
    waker: Waker,
}

/// A task's end. When the last one is gone the port reports the end.
pub struct Sender<M> {
    sender: Option<mpsc::Sender<M>>,
    waker: Waker,
}

/// A bounded channel from engine tasks to the backend's own thread.
pub fn port<M>(capacity: usize) -> Result<(Sender<M>, Port<M>)> {
    let waker = Waker::new().map_err(|e| {
        PgError::new(
            "53000",
            format!("could not create an event descriptor: {e}"),
        )
    })?;
    let (sender, receiver) = mpsc::channel(capacity);
    Ok((
        Sender {
            sender: Some(sender),
            waker: waker.clone(),
        },
        Port { receiver, waker },
    ))
}

impl<M> Port<M> {
    /// The next message; None when every sender is gone. Cancel and termination are served while waiting.
    pub fn receive(&mut self) -> Option<M> {
        loop {
            if let Some(message) = self.receive_within(Duration::from_secs(5)) {
                return message;
            }
        }
    }

    /// The next message, if it comes within the time and before this process is woken for something else: else None.
    pub fn receive_or_wake(&mut self, time: Duration) -> Option<Option<M>> {
        let mut waited = false;
        loop {
            match self.receiver.try_recv() {
                Ok(message) => return Some(Some(message)),
                Err(mpsc::error::TryRecvError::Disconnected) => return Some(None),
                Err(mpsc::error::TryRecvError::Empty) if waited => return None,
                Err(mpsc::error::TryRecvError::Empty) => {
                    wait::wait(Some(&self.waker), time);
                    waited = true;
                }
            }
        }
    }

    /// As [`Self::receive`], for a while: None when it is over.
    pub fn receive_within(&mut self, time: Duration) -> Option<Option<M>> {
        let end = Instant::now() + time;
        loop {
            match self.receiver.try_recv() {
                Ok(message) => return Some(Some(message)),
                Err(mpsc::error::TryRecvError::Disconnected) => return Some(None),
                Err(mpsc::error::TryRecvError::Empty) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    wait::wait(Some(&self.waker), left);
                }
            }
        }
    }
}

impl<M> Sender<M> {
    /// Sends and wakes the backend. False: it has gone away, the task should end.
    pub async fn send(&self, message: M) -> bool {
        let Some(sender) = &self.sender else {
            return false;
        };
        let sent = sender.send(message).await.is_ok();
        self.waker.wake();
        sent
    }
}

impl<M> Clone for Sender<M> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            waker: self.waker.clone(),
        }
    }
}

impl<M> Drop for Sender<M> {
    fn drop(&mut self) {
        // First closed, then woken: the backend must see the end when it looks.
        drop(self.sender.take());
        self.waker.wake();
    }
}
