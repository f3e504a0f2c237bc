//! The server side of `tests::lab::exec`: a thread per connection, a program per thread.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tests::lab::exec::{Frame, PORT, Request};

/// How long a program's output is awaited after its end: a background child may hold the pipe.
const DRAIN: Duration = Duration::from_secs(1);

/// A program's output, and the frame it is sent in.
type Source = (Box<dyn Read + Send>, fn(Vec<u8>) -> Frame);
type Client = Arc<Mutex<TcpStream>>;

/// Serves for ever.
pub(crate) fn serve(token_file: &Path) -> anyhow::Result<()> {
    let token = std::fs::read_to_string(token_file)
        .with_context(|| format!("no lab secret in {}", token_file.display()))?;
    let token = token.trim().to_owned();
    let listener =
        TcpListener::bind(("0.0.0.0", PORT)).context("another lab-node serves already")?;
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let token = token.clone();
        std::thread::spawn(move || {
            // A client that went away needs no answer.
            let _ = serve_client(stream, &token);
        });
    }
    Ok(())
}

fn send(client: &Client, frame: &Frame) -> io::Result<()> {
    frame.write(&mut *client.lock().unwrap_or_else(PoisonError::into_inner))
}

fn serve_client(mut stream: TcpStream, token: &str) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let client = Arc::new(Mutex::new(stream.try_clone()?));
    let Frame::Request(json) = Frame::read(&mut stream)? else {
        return Ok(send(&client, &Frame::Refused("a request comes first".into()))?);
    };
    stream.set_read_timeout(None)?;
    let request: Request = serde_json::from_slice(&json)?;
    if request.token != token {
        return Ok(send(&client, &Frame::Refused("wrong lab secret".into()))?);
    }
    let started = start(&request);
    let Running { mut child, mut stdin, outputs } = match started {
        Ok(running) => running,
        Err(error) => return Ok(send(&client, &Frame::Refused(format!("{error:#}")))?),
    };
    send(&client, &Frame::Started)?;
    let group = Pid::from_raw(i32::try_from(child.id())?);

    let readers: Vec<_> = outputs
        .into_iter()
        .map(|(output, wrap)| {
            let client = Arc::clone(&client);
            std::thread::spawn(move || copy_output(output, &client, wrap))
        })
        .collect();
    let ended = Arc::clone(&client);
    let over = Arc::new(AtomicBool::new(false));
    let over_by_itself = Arc::clone(&over);
    std::thread::spawn(move || {
        let status = child.wait();
        over_by_itself.store(true, Ordering::Release);
        let deadline = Instant::now() + DRAIN;
        while readers.iter().any(|reader| !reader.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        // If the client is gone nobody needs to know.
        let _ = send(&ended, &Frame::Exit(status.map_or(-1, exit_code)));
        let _ = ended.lock().unwrap_or_else(PoisonError::into_inner).shutdown(Shutdown::Both);
    });

    while let Ok(frame) = Frame::read(&mut stream) {
        let Frame::Stdin(bytes) = frame else { continue };
        let closed = match &mut stdin {
            Some(to) => bytes.is_empty() || to.write_all(&bytes).and_then(|()| to.flush()).is_err(),
            None => true,
        };
        if closed {
            stdin = None;
        }
    }
    if !over.load(Ordering::Acquire) {
        // The client left first: what it started ends with it. (What a program that ended by itself
        // left in the background is meant to stay.)
        let _ = killpg(group, Signal::SIGKILL);
    }
    Ok(())
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

fn copy_output(mut output: Box<dyn Read + Send>, client: &Client, wrap: fn(Vec<u8>) -> Frame) {
    let mut buffer = [0; 32 << 10];
    // The end of a terminal is an error, the end of a pipe is 0: both end it.
    while let Ok(count @ 1..) = output.read(&mut buffer) {
        if send(client, &wrap(buffer[..count].to_vec())).is_err() {
            return;
        }
    }
}

struct Running {
    child: Child,
    stdin: Option<Box<dyn Write + Send>>,
    outputs: Vec<Source>,
}

fn start(request: &Request) -> anyhow::Result<Running> {
    let (program, arguments) = request.argv.split_first().context("no program was named")?;
    let mut command = Command::new(program);
    command.args(arguments);
    match request.terminal {
        Some((rows, columns)) => start_on_terminal(command, rows, columns),
        None => start_on_pipes(command),
    }
    .with_context(|| format!("cannot start {program}"))
}

fn start_on_pipes(mut command: Command) -> anyhow::Result<Running> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let mut outputs: Vec<Source> = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        outputs.push((Box::new(stdout), Frame::Stdout));
    }
    if let Some(stderr) = child.stderr.take() {
        outputs.push((Box::new(stderr), Frame::Stderr));
    }
    let stdin = child.stdin.take().map(|stdin| Box::new(stdin) as Box<dyn Write + Send>);
    Ok(Running { child, stdin, outputs })
}

fn start_on_terminal(mut command: Command, rows: u16, columns: u16) -> anyhow::Result<Running> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None)?;
    let slave = |fd: &OwnedFd| fd.try_clone().map(Stdio::from);
    command.stdin(slave(&pty.slave)?).stdout(slave(&pty.slave)?).stderr(slave(&pty.slave)?);
    command.env("TERM", "xterm");
    // SAFETY: between fork and exec only async-signal-safe calls are made: setsid and an ioctl on
    // file descriptor 0, which is the terminal by then.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    let master = std::fs::File::from(pty.master);
    let reader = master.try_clone()?;
    Ok(Running {
        child,
        stdin: Some(Box::new(master)),
        outputs: vec![(Box::new(reader), Frame::Stdout)],
    })
}
