# Evaluates a Vagrantfile without Vagrant and prints, as JSON, the machines that it defines and how they are provisioned.
#
# Usage: ruby vagrant_stub.rb VAGRANTFILE. Settings that are not recorded are accepted and forgotten, so this says
# nothing about whether Vagrant knows them.
require "json"

# Accepts every setting and every nested section.
class Section
  attr_reader :set

  def initialize
    @set = {}
  end

  def method_missing(name, *arguments)
    return @set[name.to_s.chomp("=")] = arguments.first if name.end_with?("=")

    section = (@set[name.to_s] ||= Section.new)
    yield section if block_given?
    section
  end

  def respond_to_missing?(*)
    true
  end

  def to_json(*options)
    @set.to_json(*options)
  end
end

# config.vm, of the whole file or of one machine.
class Machines < Section
  def define(name)
    machine = Section.new
    machine.set["vm"] = Machines.new
    yield machine
    (@set["machines"] ||= {})[name] = machine.set["vm"]
  end

  def network(kind, ip:)
    (@set["networks"] ||= []) << [kind, ip]
  end

  def provider(name)
    yield (@set["providers"] ||= {})[name] = Section.new
  end

  def provision(kind)
    settings = Section.new
    yield settings
    (@set["provisioners"] ||= []) << [kind, settings]
  end
end

module Vagrant
  def self.configure(version)
    raise "version #{version}" unless version == "2"

    config = Section.new
    config.set["vm"] = Machines.new
    yield config
    puts config.to_json
  end
end

load File.expand_path(ARGV.fetch(0))
