//! What can be done to the modelled cluster, as a scenario's steps say it.

use ha_manager::Disarm;
use proto::{Name, TimeSpan};

use crate::scenario::{Known, Request, Switch};

/// One command that was understood. Times are in milliseconds.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Sudden when off. The network is on and off with it.
    Power(Name, Switch),
    /// Its cable.
    Network(Name, Switch),
    /// The whole node stops; clocks go on.
    Hang(Name, u64),
    /// Rate of its clock, in thousandths.
    Skew(Name, u64),
    /// Its wall clock jumps, by milliseconds.
    StepClock(Name, i64),
    /// As its operator does it.
    Shutdown(Name),
    /// As its operator does it.
    Reboot(Name),
    /// The agent alone ends, and starts again.
    RestartAgent(Name),
    /// `node drain`, `node resume`.
    Maintenance(Name, Switch),
    /// It resets nothing any more.
    FailWatchdog(Name),
    /// Its VM storage.
    Storage(Name, Switch),
    /// Messages between these two, both ways.
    Cut(Name, Name),
    /// Messages from the first to the second.
    CutOneWay(Name, Name),
    /// No cuts any more.
    Heal,
    /// So many thousandths of all messages are lost.
    Loss(u64),
    /// Each message takes up to this much longer.
    Delay(u64),
    /// What is asked for.
    Request(String, Request),
    /// Move it while it runs.
    Migrate(String, Name),
    /// Stop, move, start.
    Relocate(String, Name),
    /// Stop it; after this time, by force.
    Stop(String, u64),
    /// Its process ends.
    Crash(String),
    /// Its process hangs in a disk write: nothing but a reset of its machine ends it.
    Stick(String),
    /// A new one, with the defaults of a resource.
    Add(String, Name, Request),
    /// It is no more.
    Delete(String),
    /// An operation holds it.
    Lock(String),
    /// And lets go of it.
    Unlock(String),
    /// Thousandths of a CPU, and MiB of memory.
    Usage(String, u64, u64),
    /// Whether configuration can be written.
    Store(bool),
    /// The leader's planning stands still; heartbeats are answered.
    PauseManager(u64),
    /// HA does nothing by itself.
    Disarm(Disarm),
    /// It does again.
    Arm,
    /// A new node, with the defaults of one.
    AddNode(Name),
    /// It is no member any more.
    RemoveNode(Name),
}

/// Why a command is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No such word.
    #[error("unknown command `{0}`; there are: {all}", all = USAGE.join(", "))]
    Unknown(String),
    /// Other words than it needs.
    #[error("`{command}`: it is written `{usage}`")]
    Usage {
        /// As it was written.
        command: String,
        /// As it should be.
        usage: &'static str,
    },
    /// A word that makes no sense where it is.
    #[error("`{command}`: {why}")]
    Word {
        /// As it was written.
        command: String,
        /// What is wrong.
        why: String,
    },
}

const USAGE: [&str; 33] = [
    "power NODE on|off",
    "network NODE on|off",
    "hang NODE TIME",
    "skew NODE RATE",
    "step NODE [-]TIME",
    "shutdown NODE",
    "reboot NODE",
    "restart-agent NODE",
    "maintenance NODE on|off",
    "fail-watchdog NODE",
    "storage NODE on|off",
    "cut NODE NODE",
    "cut-one-way FROM TO",
    "heal",
    "loss PERCENT",
    "delay TIME",
    "request RESOURCE started|stopped|ignored",
    "migrate RESOURCE NODE",
    "relocate RESOURCE NODE",
    "stop RESOURCE TIME",
    "crash RESOURCE",
    "stick RESOURCE",
    "add RESOURCE NODE started|stopped",
    "delete RESOURCE",
    "lock RESOURCE",
    "unlock RESOURCE",
    "usage RESOURCE CPUS MEMORY_MIB",
    "store up|down",
    "pause-manager TIME",
    "disarm freeze|ignore",
    "arm",
    "add-node NODE",
    "remove-node NODE",
];

/// A year: what lasts longer is a slip.
const LONGEST_MS: u64 = 365 * 86_400_000;

struct Parser<'a> {
    command: &'a str,
    words: Vec<&'a str>,
    known: &'a mut Known,
}

impl Command {
    /// Reads one command; what it adds or removes is known to the next ones.
    pub(crate) fn parse(text: &str, known: &mut Known) -> Result<Self, CommandError> {
        let mut words = text.split_whitespace();
        let verb = words.next().unwrap_or_default();
        let usage = USAGE.into_iter().find(|usage| usage.split(' ').next() == Some(verb));
        let usage = usage.ok_or_else(|| CommandError::Unknown(text.to_owned()))?;
        let words: Vec<&str> = words.collect();
        if words.len() != usage.split(' ').count() - 1 {
            return Err(CommandError::Usage { command: text.to_owned(), usage });
        }
        Parser { command: text, words, known }.parse(verb)
    }
}

impl Parser<'_> {
    fn parse(mut self, verb: &str) -> Result<Command, CommandError> {
        Ok(match verb {
            "power" => Command::Power(self.node(0)?, self.switch(1)?),
            "network" => Command::Network(self.node(0)?, self.switch(1)?),
            "hang" => Command::Hang(self.node(0)?, self.time(1)?),
            "skew" => Command::Skew(self.node(0)?, self.rate(1)?),
            "step" => Command::StepClock(self.node(0)?, self.signed_time(1)?),
            "shutdown" => Command::Shutdown(self.node(0)?),
            "reboot" => Command::Reboot(self.node(0)?),
            "restart-agent" => Command::RestartAgent(self.node(0)?),
            "maintenance" => Command::Maintenance(self.node(0)?, self.switch(1)?),
            "fail-watchdog" => Command::FailWatchdog(self.node(0)?),
            "storage" => Command::Storage(self.node(0)?, self.switch(1)?),
            "cut" => Command::Cut(self.node(0)?, self.node(1)?),
            "cut-one-way" => Command::CutOneWay(self.node(0)?, self.node(1)?),
            "heal" => Command::Heal,
            "loss" => Command::Loss(self.per_mille(0)?),
            "delay" => Command::Delay(self.time(0)?),
            "request" => Command::Request(self.resource(0)?, self.request(1)?),
            "migrate" => Command::Migrate(self.resource(0)?, self.node(1)?),
            "relocate" => Command::Relocate(self.resource(0)?, self.node(1)?),
            "stop" => Command::Stop(self.resource(0)?, self.time(1)?),
            "crash" => Command::Crash(self.resource(0)?),
            "stick" => Command::Stick(self.resource(0)?),
            "add" => self.add()?,
            "delete" => self.delete()?,
            "lock" => Command::Lock(self.resource(0)?),
            "unlock" => Command::Unlock(self.resource(0)?),
            "usage" => {
                Command::Usage(self.resource(0)?, self.thousandths(1, 1e6)?, self.number(2)?)
            }
            "store" => Command::Store(self.one_of(0, &[("up", true), ("down", false)])?),
            "pause-manager" => Command::PauseManager(self.time(0)?),
            "disarm" => Command::Disarm(
                self.one_of(0, &[("freeze", Disarm::Freeze), ("ignore", Disarm::Ignore)])?,
            ),
            "arm" => Command::Arm,
            "add-node" => self.add_node()?,
            "remove-node" => {
                let node = self.node(0)?;
                self.known.nodes.remove(&node);
                Command::RemoveNode(node)
            }
            other => return Err(CommandError::Unknown(other.to_owned())),
        })
    }

    fn word(&self, index: usize) -> &str {
        self.words.get(index).copied().unwrap_or_default()
    }

    fn wrong<T>(&self, why: impl ToString) -> Result<T, CommandError> {
        Err(CommandError::Word { command: self.command.to_owned(), why: why.to_string() })
    }

    fn node(&self, index: usize) -> Result<Name, CommandError> {
        let node: Option<Name> = self.word(index).parse().ok();
        match node.filter(|node| self.known.nodes.contains(node)) {
            Some(node) => Ok(node),
            None => self.wrong(format!("there is no node `{}`", self.word(index))),
        }
    }

    fn resource(&self, index: usize) -> Result<String, CommandError> {
        let id = self.word(index);
        match self.known.resources.contains(id) {
            true => Ok(id.to_owned()),
            false => self.wrong(format!("there is no resource `{id}`")),
        }
    }

    fn one_of<T: Copy>(&self, index: usize, words: &[(&str, T)]) -> Result<T, CommandError> {
        let word = self.word(index);
        if let Some((_, value)) = words.iter().find(|(known, _)| *known == word) {
            return Ok(*value);
        }
        let all: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        self.wrong(format!("`{word}` is none of {}", all.join(", ")))
    }

    fn switch(&self, index: usize) -> Result<Switch, CommandError> {
        self.one_of(index, &[("on", Switch::On), ("off", Switch::Off)])
    }

    fn request(&self, index: usize) -> Result<Request, CommandError> {
        let words = [
            ("started", Request::Started),
            ("stopped", Request::Stopped),
            ("ignored", Request::Ignored),
        ];
        self.one_of(index, &words)
    }

    fn time(&self, index: usize) -> Result<u64, CommandError> {
        self.time_of(self.word(index))
    }

    fn time_of(&self, word: &str) -> Result<u64, CommandError> {
        match word.parse::<TimeSpan>() {
            Ok(span) if span.as_ms() <= LONGEST_MS => Ok(span.as_ms()),
            Ok(_) => self.wrong(format!("`{word}` is longer than a year")),
            Err(error) => self.wrong(error),
        }
    }

    fn signed_time(&self, index: usize) -> Result<i64, CommandError> {
        let word = self.word(index);
        let back = word.strip_prefix('-');
        let ms = self.time_of(back.unwrap_or(word))?;
        let ms = i64::try_from(ms).or_else(|error| self.wrong(error))?;
        Ok(if back.is_some() { -ms } else { ms })
    }

    fn number(&self, index: usize) -> Result<u64, CommandError> {
        let word = self.word(index);
        match word.parse::<u64>() {
            Ok(number) if number <= 1 << 30 => Ok(number),
            _ => self.wrong(format!("`{word}` is not a number up to 2^30")),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bounded by what is checked before"
    )]
    fn thousandths(&self, index: usize, most: f64) -> Result<u64, CommandError> {
        let word = self.word(index);
        match word.parse::<f64>() {
            Ok(number) if (0.0..=most).contains(&number) => Ok((number * 1000.0).round() as u64),
            _ => self.wrong(format!("`{word}` is not a number from 0 to {most}")),
        }
    }

    fn rate(&self, index: usize) -> Result<u64, CommandError> {
        let rate = self.thousandths(index, 10.0)?;
        if rate < 100 { self.wrong("a clock's rate is 0.1 to 10") } else { Ok(rate) }
    }

    fn per_mille(&self, index: usize) -> Result<u64, CommandError> {
        let word = self.word(index);
        let number = word.strip_suffix('%').unwrap_or(word).parse::<f64>();
        match number {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "0 to 1000"
            )]
            Ok(percent) if (0.0..=100.0).contains(&percent) => Ok((percent * 10.0).round() as u64),
            _ => self.wrong(format!("`{word}` is not 0% to 100%")),
        }
    }

    fn add(&mut self) -> Result<Command, CommandError> {
        let id = self.word(0).to_owned();
        let node = self.node(1)?;
        let words = [("started", Request::Started), ("stopped", Request::Stopped)];
        let request = self.one_of(2, &words)?;
        if let Err(why) = crate::scenario::resource_name(&id) {
            return self.wrong(why);
        }
        self.known.ever.insert(id.clone());
        if !self.known.resources.insert(id.clone()) {
            return self.wrong(format!("there is a resource `{id}` already"));
        }
        Ok(Command::Add(id, node, request))
    }

    /// Expectations may still speak of it, and it may be added again.
    fn delete(&mut self) -> Result<Command, CommandError> {
        let id = self.resource(0)?;
        self.known.resources.remove(&id);
        Ok(Command::Delete(id))
    }

    fn add_node(&mut self) -> Result<Command, CommandError> {
        match self.word(0).parse::<Name>() {
            Ok(name) if self.known.nodes.insert(name.clone()) => Ok(Command::AddNode(name)),
            Ok(name) => self.wrong(format!("there is a node `{name}` already")),
            Err(error) => self.wrong(error),
        }
    }
}
