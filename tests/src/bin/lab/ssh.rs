//! `lab ssh`: a command, or a shell on a terminal, in a node.

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tests::lab::Lab;
use tests::lab::exec::{self, Frame};
use tests::lab::loopback;
use tests::lab::state::Backend;

/// A node that has not started the program by then is hung or cut off.
const ANSWER: std::time::Duration = std::time::Duration::from_secs(10);

/// Runs it and passes its output and exit code on. A shell has a terminal where this program has one,
/// a command where it is to have one.
pub(crate) fn ssh(
    lab: &Lab,
    node: u32,
    command: &[String],
    terminal: bool,
) -> anyhow::Result<ExitCode> {
    let shell = ["sh".to_owned(), "-l".to_owned()];
    let is_terminal = std::io::stdin().is_terminal();
    anyhow::ensure!(is_terminal || !terminal, "-t: the standard input here is no terminal");
    let interactive = is_terminal && (terminal || command.is_empty());
    let argv: Vec<&str> =
        if command.is_empty() { &shell[..] } else { command }.iter().map(String::as_str).collect();
    let terminal = interactive.then(terminal_size);
    lab.state().node(node)?;
    if lab.state().backend == Backend::Process {
        let status = loopback::command(lab.folder(), node, &argv)?.status()?;
        return Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)));
    }
    let mut stream = exec::start(lab.exec_address(node)?, &lab.request(&argv, terminal), ANSWER)?;
    let raw = if interactive { Some(RawMode::enter()?) } else { None };

    let mut to_node = stream.try_clone()?;
    std::thread::spawn(move || {
        let mut buffer = [0; 16 << 10];
        loop {
            let count = std::io::stdin().read(&mut buffer).unwrap_or(0);
            let sent = Frame::Stdin(buffer[..count].to_vec()).write(&mut to_node);
            if count == 0 || sent.is_err() {
                return;
            }
        }
    });
    let code = loop {
        match Frame::read(&mut stream)? {
            Frame::Stdout(bytes) => {
                std::io::stdout().write_all(&bytes)?;
                std::io::stdout().flush()?;
            }
            Frame::Stderr(bytes) => std::io::stderr().write_all(&bytes)?,
            Frame::Exit(code) => break code,
            Frame::Refused(why) => anyhow::bail!("the node did not start it: {why}"),
            Frame::Request(_) | Frame::Stdin(_) | Frame::Started => {
                anyhow::bail!("the node sent nonsense")
            }
        }
    };
    drop(raw);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

fn terminal_size() -> (u16, u16) {
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    // SAFETY: an all-zero winsize is a valid value.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: `size` is a winsize, which is what this ioctl writes to.
    let known = unsafe { libc::ioctl(1, libc::TIOCGWINSZ, &raw mut size) } == 0 && size.ws_row > 0;
    if known {
        (size.ws_row, size.ws_col)
    } else {
        (number("LINES").unwrap_or(24), number("COLUMNS").unwrap_or(80))
    }
}

/// The terminal passes every key on while this lives.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> anyhow::Result<Self> {
        let before = tcgetattr(std::io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // At worst the terminal stays raw, which `reset` heals.
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
